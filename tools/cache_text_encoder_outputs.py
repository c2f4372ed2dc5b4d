"""Encodes the captions of a dataset ahead of training, into files beside its images; what is there already stays."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console, options
from library.options.cache_tool import CacheToolOptions

GROUPS = (CacheToolOptions, *options.TRAINING)


def main() -> None:
    console.setup(None)
    settings = cli.parse(GROUPS, description=__doc__)
    from library.training import preflight

    datasets = preflight.check_caching(settings, options.CacheOptions(cache_text_encoder_outputs_to_disk=True))
    with console.quiet_dependencies():
        from library.training.text_caching import cache_text_ahead
    skip_check = settings[options.CacheOptions].skip_cache_check or settings[CacheToolOptions].skip_existing
    cache_text_ahead(settings, datasets, skip_check=skip_check)


if __name__ == "__main__":
    cli.run(main)
