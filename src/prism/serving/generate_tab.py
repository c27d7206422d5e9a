"""The tab Generate: a prompt and a plan go in; cuts, winner and ledger appear while the run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prism.errors import PrismError, number, whole
from prism.serving import fragments
from prism.serving.jobs import Job, Wish
from prism.serving.web import typed

if TYPE_CHECKING:
    from prism.serving.page import Desk

LOOKS = {
    "Look ahead (shows pictures)": "ahead",
    "As the head sees best": None,
    "The noisy latents": "now",
}
SECONDS = 0.8  # between two looks at a run
BUDGET, CUTS = "For a budget", "By cuts of mine"


def build(gradio: Any, desk: Desk) -> None:
    """Put the tab's components and events into the open block."""
    jobs, shelf = desk.jobs, desk.shelf
    assert jobs is not None
    dimensions = list(desk.judge.dimensions)
    by = "overall" if "overall" in dimensions else dimensions[0]
    pictures = desk.backbone.takes("image")

    with gradio.Row():
        with gradio.Column(scale=4, min_width=300):
            prompt = gradio.Textbox(
                label="Prompt", lines=3, placeholder="What the video should show", elem_id="pz-prompt", max_lines=8
            )
            if desk.examples:
                gradio.Examples([[text] for text in desk.examples], [prompt], label="For example", cache_examples=False)
            start = gradio.Button("Generate", variant="primary", elem_id="pz-generate")
            said = gradio.HTML("")
            image = gradio.Image(
                label="Image to start from", type="filepath", format="png", elem_id="pz-image", visible=pictures
            )
            way = gradio.Radio([CUTS, BUDGET], value=CUTS, label="How the run spends")
            with gradio.Group() as group_cuts:
                n = gradio.Slider(1, 64, value=8, step=1, label="Candidates", elem_id="pz-n")
                schedule = gradio.Textbox(
                    label="Cuts",
                    elem_id="pz-schedule",
                    placeholder="1 after a fifth of the steps",
                    info="STEP:KEEP, such as 4:3,6:1",
                )
                look = gradio.Dropdown(list(LOOKS), value=next(iter(LOOKS)), label="What is judged at a cut")
            with gradio.Group(visible=False) as group_budget:
                budget = gradio.Slider(1, 20, value=3, step=0.1, label="Cost, in plain samples")
            with gradio.Accordion("More", open=False):
                seed = gradio.Number(value=0, precision=0, label="Seed of the first candidate")
                select = gradio.Dropdown(dimensions, value=by, label="Dimension that decides")
                steps = gradio.Number(value=None, precision=0, label="Steps (empty: the pipeline's)")
                negative = gradio.Textbox(
                    label="Negative prompt", visible=desk.backbone.takes("negative_prompt"), lines=1
                )
        with gradio.Column(scale=7, min_width=320):
            acts = 'prismActs(element, trigger); // "cancel"'
            head = gradio.HTML(fragments.head(None), js_on_load=acts, elem_id="pz-head")
            won = gradio.HTML("", elem_id="pz-won")
            cuts = gradio.HTML("", elem_id="pz-cuts")
        with gradio.Column(scale=3, min_width=220):
            ledger = gradio.HTML("", elem_id="pz-ledger")
            gradio.HTML('<div class="pz-soft"><b>Runs</b></div>')
            acts = 'prismActs(element, trigger); // "pick"'
            listed = gradio.HTML(fragments.runs(jobs, None), js_on_load=acts, elem_id="pz-runs")

    chosen, seen = gradio.State(None), gradio.State(())
    view = [head, won, cuts, ledger, listed, seen]

    def marks(job: Job | None) -> tuple[Any, ...]:
        every = tuple((other.name, other.state) for other in jobs.all())
        ahead = jobs.ahead_of(job) if job else 0
        return (job and (job.name, job.version), job and (job.rows, job.state, ahead), every)

    def looked(name: str | None, before: tuple[Any, ...] = ()) -> list[Any]:
        """The parts that have changed since `before`."""
        job, skip = jobs.get(name), gradio.skip()
        now = marks(job)
        if before and now == before:
            return [skip] * len(view)
        version, rows, every = (not before or a != b for a, b in zip(now, before or now))
        return [
            fragments.head(job, jobs.ahead_of(job) if job else 0) if version or rows else skip,
            fragments.winner(job, shelf) if version else skip,
            fragments.cuts(job, shelf) if version else skip,
            fragments.ledger(job) if version or rows else skip,
            fragments.runs(jobs, name) if version or every else skip,
            now,
        ]

    def submit(
        text: str, start_image: Any, how: str, count: Any, cut: str, at_cuts: str, cost: Any, first: Any, decide: str,
        number_of_steps: Any, avoid: str,
    ) -> list[Any]:  # fmt: skip
        try:
            call: dict[str, Any] = {}
            if number_of_steps:
                call["num_inference_steps"] = whole("The number of steps", int(number_of_steps), 1, 10_000)
            if (avoid or "").strip():
                call["negative_prompt"] = avoid.strip()
            wish = Wish(
                (text or "").strip(),
                number("The cost", float(cost), 1) if how == BUDGET else None,
                whole("The number of candidates", int(count), 1, 10_000),
                (cut or "").strip(),
                LOOKS.get(at_cuts),
                whole("The seed", int(first or 0), 0, 2**62),
                decide,
                start_image,
                call,
            )
            job = jobs.submit(wish)
        except PrismError as error:
            return [gradio.skip(), fragments.note(str(error), "error"), *[gradio.skip()] * len(view)]
        return [job.name, "", *looked(job.name)]

    def pick(event: Any) -> list[Any]:
        name = str(event.run)
        return [name, *looked(name)]

    def cancel(event: Any, name: str | None) -> list[Any]:
        jobs.cancel(str(event.run))
        return looked(name)

    inputs = [prompt, image, way, n, schedule, look, budget, seed, select, steps, negative]
    quiet = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    start.click(submit, inputs, [chosen, said, *view], **quiet)
    prompt.submit(submit, inputs, [chosen, said, *view], **quiet)
    listed.pick(typed(pick, event=gradio.EventData), None, [chosen, *view], **quiet)
    head.cancel(typed(cancel, event=gradio.EventData), [chosen], view, **quiet)
    way.change(
        lambda how: [gradio.update(visible=how == CUTS), gradio.update(visible=how == BUDGET)],
        way,
        [group_cuts, group_budget],
        **quiet,
    )
    gradio.Timer(SECONDS).tick(looked, [chosen, seen], view, **quiet)
