"""Trains a network (LoRA or a relative) beside a Stable Diffusion model."""

from library import cli, console, options

GROUPS = (
    options.ModelOptions,
    options.DatasetOptions,
    options.CacheOptions,
    options.LoaderOptions,
    options.NetworkOptions,
    options.TrainingOptions,
    options.OptimizerOptions,
    options.PrecisionOptions,
    options.SaveOptions,
    options.MetadataOptions,
    options.PreviewOptions,
    options.LogOptions,
    options.ConfigOptions,
)


def main() -> None:
    console.setup(None)
    settings = cli.parse(GROUPS, description=__doc__)
    from library.training import preflight

    plans = preflight.check(settings)
    with console.quiet_dependencies():
        from library.training.launch import launch
        from library.training.methods.network import NetworkMethod
    method = NetworkMethod(settings[options.NetworkOptions], settings[options.OptimizerOptions])
    launch(settings, plans, method)


if __name__ == "__main__":
    cli.run(main)
