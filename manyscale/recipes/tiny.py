"""The tiny twin of any recipe: its switches, augmentation and schedule on a micro net and the embedded digits."""

from dataclasses import replace

from manyscale.config import Run


def tiny(run: Run) -> Run:
    """The same story in a CPU minute: to see that a recipe runs before paying for it.

    The net shrinks to two stages, pictures to 32 px and the window to 4; the rates stay those of the recipe at batch 64.
    A fine-tune starts from nothing, since the weights it wants are not there.
    """
    model = replace(
        run.model, image_size=32, patch=4, width=32, depths=(2, 2), heads=(2, 4), mlp_ratio=2.0,
        window=4, pretrained_window=2 if run.model.pretrained_window else 0,
    )  # fmt: skip
    return replace(
        run,
        recipe=f"{run.recipe}_tiny",
        model=model,
        input=replace(run.input, data="digits", workers=0),
        schedule=replace(
            run.schedule,
            epochs=2,
            warmup="20%",
            milestones=tuple(2 * epoch / run.schedule.epochs for epoch in run.schedule.milestones),
            evaluate_every=1,
        ),
        simmim=replace(run.simmim, mask_unit=8, target_window=run.simmim.target_window and 15),
        optim=replace(run.optim, lr_batch=run.optim.lr_batch and 64),
        batch=64,
        accumulate=1,
        init="",
    )
