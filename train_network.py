"""Trains a network (LoRA or a relative) beside a Stable Diffusion model."""

from library import cli, console, options

GROUPS = (options.NetworkOptions, *options.TRAINING)


def main() -> None:
    console.setup(None)
    settings = cli.parse(GROUPS, description=__doc__)
    from library.training import preflight

    plans = preflight.check(settings, trains_text_encoder=settings[options.NetworkOptions].trains_text_encoder)
    with console.quiet_dependencies():
        from library.training.launch import launch
        from library.training.methods.network import NetworkMethod
    method = NetworkMethod(settings[options.NetworkOptions], settings[options.OptimizerOptions])
    launch(settings, plans, method)


if __name__ == "__main__":
    cli.run(main)
