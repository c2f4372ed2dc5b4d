"""--debug_dataset: what the model would see, without loading it."""

from library import console
from library.data.plan import RunPlan
from library.data.records import RecordTable
from library.data.report.sheet import write_sheet
from library.models.registry import ModelInfo
from library.models.text import token_report
from library.options.base import Settings
from library.options.dataset import DatasetOptions
from library.options.saving import SaveOptions
from library.options.training import TrainingOptions
from library.training.methods.base import Method
from library.training.preflight import Plans
from library.training.text_caching import text_options


def show_dataset(
    settings: Settings, plans: Plans, info: ModelInfo, table: RecordTable, run: RunPlan, method: Method
) -> None:
    """Write a page of pictures and captions as they are trained on into the output folder, and print its path."""
    if console.rank():
        return
    training = settings[TrainingOptions]
    # one process that sees in each step what all of the run's see together
    plan = RunPlan(table, plans.datasets, seed=run.seed, accumulation=run.accumulation * run.world)
    tokenizers, text = info.family.tokenizers(), text_options(settings)
    for tokenizer in tokenizers.values():
        method.add_words(tokenizer)

    def count_tokens(caption: str) -> dict[str, tuple[int, str]]:
        reports = {
            name: token_report(caption, tokenizer, text.token_length, text.weighted)
            for name, tokenizer in tokenizers.items()
        }
        return {name: (report.count, report.cut or "") for name, report in reports.items()}

    page = write_sheet(
        plans.output_dir / f"{settings[SaveOptions].name}_dataset",
        table,
        plans.datasets,
        plan,
        count_tokens,
        total_steps=training.total_steps(plan.steps_per_epoch),
        masked_loss=settings[DatasetOptions].masked_loss,
        templates=method.templates(),
    )
    print(f"what is trained on is shown in {page}")
