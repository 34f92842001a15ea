"""The tiny twin of any recipe: its switches, augmentation and schedule on a micro net and the embedded digits."""

from dataclasses import replace

from manyscale.config import NetConfig, Run, SuperViTConfig, SwinConfig


def tiny(run: Run) -> Run:
    """The same story in a CPU minute: to see that a recipe runs before paying for it.

    The net shrinks to two stages or blocks, pictures to 32 px and the window to 4; the rates stay those of the recipe at
    batch 64. A fine-tune starts from nothing, since the weights it wants are not there; a trunk gets two short branches.
    """
    schedule = run.schedule
    learns = replace(
        run.supernet, teacher="size" if run.supernet.teacher == "other" else run.supernet.teacher, token_labels="picture", teacher_run=""
    )
    return replace(
        run,
        recipe=f"{run.recipe}_tiny",
        model=_net(run.model),
        input=replace(run.input, data="digits", share=1.0, workers=0),
        schedule=replace(
            schedule,
            epochs=2,
            length="",
            warmup="2-steps" if schedule.branches else "20%",
            timescale=0,
            cooldown="40%" if schedule.cooldown else 0,
            branches=("1.5-epochs", "2-epochs") if schedule.branches else (),
            milestones=tuple(2 * epoch / schedule.epochs for epoch in schedule.milestones),
            evaluate_every=1,
        ),
        simmim=replace(run.simmim, mask_unit=8, target_window=run.simmim.target_window and 15),
        supernet=learns,
        fewshot=replace(run.fewshot, probe=("digits",) if run.fewshot.probe else ()),
        optim=replace(run.optim, lr_batch=run.optim.lr_batch and 64),
        batch=64,
        accumulate=1,
        init="",
    )


def _net(net: NetConfig) -> NetConfig:
    if isinstance(net, SwinConfig):
        return replace(net, image_size=32, patch=4, width=32, depths=(2, 2), heads=(2, 4), mlp_ratio=2.0,
                       window=4, pretrained_window=2 if net.pretrained_window else 0)  # fmt: skip
    if isinstance(net, SuperViTConfig):
        return replace(net, sizes=(16, 24, 32), patch=4, width=32, depth=4, heads=2, mlp_width=64, drop_blocks=(1, 2), stem_width=8)
    return replace(net, image_size=32, patch=8, width=32, depth=2, heads=2, mlp_width=64, pre_logits=net.pre_logits and 32)
