"""A page on which to try edits: each is a run of edit.py in a folder of its own, one at a time.

python demo.py                              # at http://127.0.0.1:7860, with the shipped model
python demo.py model=sd15 device=cuda:1     # begins with these settings of edit.py

GRADIO_SERVER_NAME=0.0.0.0 lets other machines in, and GRADIO_SERVER_PORT is another port.
"""

import itertools
import os
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import edit
import models
from data.images import CLONE, find, to_pil
from data.openmoji_edits import SIDE, OpenMojiEdits
from errors import InputError
from evaluation import cli, config, report

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
except ImportError:
    cli.end('error: the page needs gradio: pip install -e ".[demo]"', 1)

HYDRA = threading.Lock()  # it composes one config at a time


def composed(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig, Callable[[str], list[str]]]:
    """The config of `python edit.py OVERRIDES`, the choices in it, and a function that lists the options of a group."""
    with HYDRA, initialize_config_dir(str(CLONE / "conf"), version_base="1.3"):
        cfg = compose("edit", [cli.quoted(each) for each in overrides], return_hydra_config=True)
        options = GlobalHydra.instance().config_loader().get_group_options
    return OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"]), cfg.hydra.runtime.choices, options


def settings(overrides: Sequence[str]) -> dict[str, tuple]:
    """The value of each setting, its meaning, and whether it is a main one. Main are those for which conf/suited.yaml
    has values of papers, and all of a method that it does not know."""
    cfg, chosen, options = composed(overrides)
    suited = OmegaConf.load(CLONE / "conf" / "suited.yaml").values()
    main = {f"{group}.{name}" for of in suited for group, own in of.get(chosen.method, {}).items() for name in own}
    about = {f"{c.target} {name}": words for c in config.choices() for name, (_, words) in c.settings.items()}
    parts = [name for name in config.GROUPS if name in cfg.method]
    found = {"inversion": (chosen.inversion, " | ".join(options("inversion")), True)} if "inversion" in parts else {}
    for group in ("method", *parts):
        for name in (name for name in cfg[group] if name not in ("_target_", *parts)):
            full, words = f"{group}.{name}", about.get(f"{cfg[group]['_target_']} {name}", "")
            found[full] = cfg[group][name], words, full in main if main else group == "method"
    common = {"negative_prompt": "what guidance leads away from", "fit": "crop | pad | stretch | keep", "seed": ""}
    return found | {name: (cfg[name], words, False) for name, words in common.items()}


def field(name: str, value, about: str):
    """A field for one setting: a list of options where `about` names some with |."""
    first, *others = about.split(" | ")
    options = [re.search(r"\w*$", first.split(" (")[0])[0], *(re.match(r"\w*", other)[0] for other in others)]
    value = "null" if value is None else str(value)
    kind = {"choices": options} if value in options[: 9 * len(others)] else {}
    return (gr.Dropdown if kind else gr.Textbox)(value=value, label=name.removeprefix("method."), info=about, **kind)


def page(given: Sequence[str], folder: Path) -> gr.Blocks:
    """The page, which begins with the settings `given`. Runs go to `folder`."""
    (cfg, chosen, options), places, kept = composed(given), (folder / f"{i:03d}" for i in itertools.count()), {}
    edits = OpenMojiEdits("openmoji_edits_tuning", limit=1)
    examples = [[to_pil(edits.load(e, SIDE).image), e.prompt, e.source_prompt] for e in edits.share]
    first = [cfg.image, cfg.prompt, cfg.source_prompt] if cfg.image else list(cfg.example.values())
    with gr.Blocks(title="palimpsest") as blocks, gr.Row():
        with gr.Column() as left:
            picture = gr.ImageMask(
                str(find(first[0])), label="picture: paint where the edit belongs, or nowhere", type="pil", height=360,
                sources=["upload", "clipboard"], transforms=[], brush=gr.Brush(colors=["#ff00ff"], color_mode="fixed"),
            )  # fmt: skip
            prompt = gr.Textbox(first[1], label="prompt", info="what the edited picture should show")
            source = gr.Textbox(first[2], label="source prompt", info="what it shows now; some methods need it")
            with gr.Row():
                method = gr.Dropdown(options("method"), value=chosen.method, label="method")
                model = gr.Dropdown(options("model"), value=chosen.model, label="model")
                weights = gr.Textbox(label="its weights", placeholder="PATH, or empty")
        with gr.Column():
            button = gr.Button("Edit", variant="primary")
            gallery = gr.Gallery(show_label=False, format="png", columns=3)
            slider, axis = gr.Slider(0, 1, step=0.05, visible=False), gr.State()
            notes, command = gr.Markdown(), gr.Textbox(label="the same from a shell", buttons=["copy"])
            gr.Examples(examples, [picture, prompt, source], examples_per_page=5)
        outputs = [gallery, slider, axis, notes, command]

    def load(*path, **how):
        if (key := repr((path, how))) not in kept:
            kept.clear()  # before the next model needs its memory
            kept[key] = models.load(*path, **how)
        return kept[key]

    def edited(drawn: dict | None, old: list, changed: dict, overrides: dict) -> list:
        """Edit the picture under the settings `overrides` and `changed`, and show it beside `old` edits."""
        if not drawn or not drawn["background"]:
            raise InputError("choose a picture")
        if any("${" in str(value) or "_target_" in str(value) for value in changed.values()):  # reach secrets, or code
            raise InputError("a value on this page holds neither ${ nor _target_")
        place = next(places)
        place.mkdir(parents=True)
        images = {"mask": paint for paint in drawn["layers"] if paint.getbbox()} | {"image": drawn["background"]}
        for name, image in images.items():
            image.save(place / f"{name}.png")
            changed[name] = place / f"{name}.png"
        typed = (overrides | {name: f"{name}={value}" for name, value in changed.items()}).values()
        own, chosen, _ = composed(["logger.mode=disabled", *typed])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            edit.edit(own, place, chosen, load)
        rows = report.run_rows(place)
        names = [name for name in rows[0] if name.startswith("edit.")]
        shown = old or [(place / rows[0][name], name) for name in ("input", "reconstruction") if name in rows[0]]
        shown += [(place / row["file"], report.describe(row, names)) for row in rows]
        name, value = next(((name, rows[-1][name]) for name in names if 0 <= rows[-1][name] <= 1), ("", 0))
        lines = [f"{report.describe(row, names)}: {report.scores(row, 'file')}" for row in rows]
        command = " ".join(["python edit.py", *("=".join(map(shlex.quote, each.split("=", 1))) for each in typed)])
        axis = name.replace("edit.", "method.")
        notes = "\n\n".join([*(f"**{each.message}**" for each in caught), *lines, f"files: {place}"])
        return [shown, gr.Slider(label=axis, value=value, visible=bool(axis)), axis, notes, command]

    with blocks, left:

        @gr.render([method, model, weights])
        def fields(method_name: str, model_name: str, path: str) -> None:
            """A field for each setting, and listeners that read them."""
            own = {each.partition("=")[0]: each for each in given}
            own = {name: each for name, each in own.items() if method_name == chosen.method or "method." not in name}
            own |= {"model": f"model={model_name}", "method": f"method={method_name}"}
            own |= {"model.weights": f"model.weights={path}"} if path else {}
            found = settings(list(own.values()))
            with gr.Row():
                boxes = {name: field(name, *of[:2]) for name, of in found.items() if of[2]}
            with gr.Accordion("more settings", open=False), gr.Row():
                boxes |= {name: field(name, *of[:2]) for name, of in found.items() if not of[2]}
            for trigger, slid in ((button.click, False), (slider.release, True)):

                def listener(values, slid=slid, progress=gr.Progress(track_tqdm=True)):
                    changed = {name: values[box] for name, box in boxes.items() if values[box] != box.value}
                    changed |= {"prompt": values[prompt], "source_prompt": values[source]}
                    changed |= {values[axis]: values[slider]} if slid else {}
                    try:
                        return edited(values[picture], values[gallery] if slid else [], changed, own)
                    except Exception as error:  # one of the user's is a line, any other is printed too
                        line = cli.explain(error)
                        raise gr.Error(line or repr(error), duration=None, print_exception=not line) from error

                inputs = {picture, prompt, source, gallery, slider, axis, *boxes.values()}
                trigger(listener, inputs, outputs, show_progress_on=gallery, concurrency_id="edit")

    return blocks


if __name__ == "__main__":
    runs = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    page(sys.argv[1:], runs).launch()
