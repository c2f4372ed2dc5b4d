"""Lists what a network's file holds, and says what it is. Exits with 1 if there are values that are not finite."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import some
from library.options.check_lora_weights import CheckLoraWeightsOptions


def main() -> None:
    console.setup(None)
    options = cli.parse((CheckLoraWeightsOptions,), description=__doc__)[CheckLoraWeightsOptions]
    with console.quiet_dependencies():
        from library.lora.inspection import check_network
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the console cannot show
    broken = check_network(Path(options.file), options.show_all_keys)
    if broken:
        console.error(f"{len(broken)} tensors hold values that are not finite: {some(broken)}")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, "nothing is written")
