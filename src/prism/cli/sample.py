"""`prism sample`."""

from __future__ import annotations

from typing import Annotated

import typer

from prism.cli import options


def sample(
    out: options.Out,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="What the video should show.",
            show_default="none: of pipelines that take an image alone",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", metavar="INT", help="Candidates; candidate i has seed SEED + i.")] = 8,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="early: drop losers while sampling. draft: judge coarse runs. full: finish all, then judge. "
            "random: any seed. none: the first seed.",
        ),
    ] = "early",
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="CUTS",
            help="Cuts of early as STEP:KEEP,... with steps from 1; 3:4,6:1 keeps the best 4 at step 3, 1 at step 6.",
            show_default="1 after a fifth of the steps",
        ),
    ] = None,
    draft_steps: Annotated[
        int | None,
        typer.Option("--draft-steps", metavar="INT", help="Steps of a draft.", show_default="15 % of the steps"),
    ] = None,
    judge_at: Annotated[
        float | None,
        typer.Option(
            "--judge-at",
            metavar="T",
            help="Noise level at which draft and full judge, above 0 (clean) to 1000 (noise).",
            show_default="700",
        ),
    ] = None,
    num_draws: Annotated[
        int, typer.Option("--num-draws", metavar="INT", help="Noise draws that draft and full average over.")
    ] = 2,
    select_by: Annotated[
        str, typer.Option("--select-by", metavar="NAME", help="Dimension that decides, or weights: VQ:1,MQ:0.5,TA:2.")
    ] = "overall",
    seed: Annotated[
        str, typer.Option("--seed", metavar="INT", help="Seed of the first candidate; random: one is drawn.")
    ] = "0",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="INT",
            help="Candidates sampled at once. 1: the video equals the stock pipeline's to the bit; more: to rounding.",
            show_default="all, or 1 above 0.5 billion parameters",
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="INT", help="How many of the best to finish: winner-2.mp4, ...")
    ] = 1,
    backbone: options.Backbone = None,
    head: options.Head = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offload: options.Offload = "none",
    lora: options.Lora = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="INT", help="Denoising steps.", rich_help_panel=options.CALL),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale",
            metavar="NUMBER",
            help="Classifier-free guidance; 1 turns it off.",
            rich_help_panel=options.CALL,
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", metavar="PIXELS", help="Height.", rich_help_panel=options.CALL)
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", metavar="PIXELS", help="Width.", rich_help_panel=options.CALL)
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option("--num-frames", metavar="INT", help="Frames.", rich_help_panel=options.CALL)
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            "--negative-prompt", metavar="TEXT", help="What the video should not show.", rich_help_panel=options.CALL
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="FILE", help="Image to start from.", rich_help_panel=options.CALL),
    ] = None,
    last_image: Annotated[
        str | None,
        typer.Option("--last-image", metavar="FILE", help="Image to end with.", rich_help_panel=options.CALL),
    ] = None,
    video: Annotated[
        str | None,
        typer.Option("--video", metavar="FILE", help="Video to start from.", rich_help_panel=options.CALL),
    ] = None,
    fps: Annotated[
        float,
        typer.Option(
            "--fps", metavar="NUMBER", help="Frames a second of the mp4, 0.1 to 240.", rich_help_panel=options.OUTPUT
        ),
    ] = 8.0,
    overwrite: options.Overwrite = False,
) -> None:
    """Sample one good video: N seeds in, losers dropped early, one decoded.

    Writes winner.mp4, metrics.json, config.json and the report. Under torchrun or
    accelerate launch the processes share the candidates.
    """
    from prism.cli.printing import show
    from prism.commands import sample as experiment

    call = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "negative_prompt": negative_prompt,
        "image": image,
        "last_image": last_image,
        "video": video,
    }
    config = experiment.SampleConfig(
        prompt=prompt,
        n=n,
        strategy=strategy,
        schedule=schedule,
        draft_steps=draft_steps,
        judge_at=judge_at,
        num_draws=num_draws,
        select_by=select_by,
        seed=options.seed_or_random(seed),
        batch_size=batch_size,
        top_k=top_k,
        backbone=backbone,
        head=head,
        call={name: value for name, value in call.items() if value is not None},
        fps=fps,
        device=device,
        dtype=dtype,
        offload=offload,
        loras=tuple(lora or ()),
    )
    metrics = experiment.run(config, out, overwrite)
    if metrics is None:  # another process of this run writes and tells
        return
    seeds = metrics["seeds"]
    among = f" (of seeds {seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else ""
    print(f"The winner is seed {seeds[metrics['winner']]}{among}: {out / 'winner.mp4'}")
    if metrics["referee_note"]:
        print(metrics["referee_note"])
    show(metrics, out)
