"""What the network scripts do, whichever models they are for. Imports no torch before the flags are checked."""

from library import cli, console, options


def train_network(description: str, *, sdxl: bool, counterpart: str) -> None:
    """Train what --network_module names, on SDXL models or on all others; `counterpart` is the script for those."""
    console.setup(None)
    groups = (options.NetworkOptions, *options.TRAINING, *((options.SdxlOptions,) if sdxl else ()))
    settings = cli.parse(groups, description=description)
    from library.training import preflight

    plans = preflight.check(settings, trains_text_encoder=settings[options.NetworkOptions].trains_text_encoder)
    with console.quiet_dependencies():
        from library.training.base_model import Script
        from library.training.launch import launch
        from library.training.methods.network import NetworkMethod
    method = NetworkMethod(settings[options.NetworkOptions], settings[options.OptimizerOptions])
    launch(settings, plans, method, Script(sdxl, counterpart))
