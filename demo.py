"""A page on which to try edits: each is a run of edit.py in a folder of its own, one at a time.

python demo.py                              # at http://127.0.0.1:7860, with the shipped model
python demo.py model=sd15 device=cuda:1     # begins with these settings of edit.py
GRADIO_SERVER_NAME=0.0.0.0 python demo.py   # lets other machines in
"""

import re
import shlex
import sys
import threading
import warnings
from datetime import datetime
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import edit
import models
from data.images import find, to_pil
from data.openmoji_edits import SIDE, OpenMojiEdits
from errors import InputError
from evaluation import cli, config, report
from files import CLONE

try:
    import gradio as gr
except ImportError:
    cli.end('error: the page needs gradio: pip install -e ".[demo]"', 1)

HYDRA = threading.Lock()  # it composes one config at a time


def composed(overrides: list[str]) -> tuple:
    """The config of `python edit.py OVERRIDES`, the choices in it, and a function that lists the options of a group.
    Raises InputError for a value that could read the environment or call any code."""
    if any("${" in each or "_target_" in each for each in overrides):
        raise InputError("a value on this page holds neither ${ nor _target_")
    with HYDRA, initialize_config_dir(str(CLONE / "conf"), version_base="1.3"):
        cfg = compose("edit", [cli.quoted(each) for each in overrides], return_hydra_config=True)
        options = GlobalHydra.instance().config_loader().get_group_options
    return OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"]), cfg.hydra.runtime.choices, options


def settings(method: str, model: str) -> dict[str, tuple]:
    """The main settings of a method, {name: (value, meaning)}: those that conf/suited.yaml sets, else all of them."""
    cfg, *_ = composed([f"method={method}", f"model={model}"])
    about = {f"{c.target} {name}": words for c in config.choices() for name, (_, words) in c.settings.items()}
    suited = OmegaConf.load(CLONE / "conf" / "suited.yaml").values()
    names = {f"{group}.{name}": group for of in suited for group, own in of.get(method, {}).items() for name in own}
    names = names or {f"method.{name}": "method" for name in cfg.method if name not in ("_target_", *config.GROUPS)}
    meaning = {name: about.get(f"{cfg[group]['_target_']} {name.split('.')[1]}", "") for name, group in names.items()}
    return {name: (OmegaConf.select(cfg, name), meaning[name]) for name in names}


def field(name: str, value, about: str) -> gr.Dropdown | gr.Textbox:
    """A field for one setting: a list of options where `about` names some with |."""
    first, *others = about.split(" | ")
    options = [re.search(r"\w*$", first.split(" (")[0])[0], *(re.match(r"\w*", other)[0] for other in others)]
    what = {"value": "null" if value is None else str(value), "label": name, "info": about, "interactive": True}
    return gr.Dropdown(options, **what) if others and what["value"] in options else gr.Textbox(**what)


def page(given: list[str]) -> gr.Blocks:
    """The page, which begins with the settings `given`."""
    (cfg, chosen, options), kept, edits = composed(given), {}, OpenMojiEdits("openmoji_edits_tuning", limit=1)
    examples = [[to_pil(edits.load(e, SIDE).image), e.prompt, e.source_prompt] for e in edits.share]
    first = [cfg.image, cfg.prompt, cfg.source_prompt] if cfg.image else list(cfg.example.values())
    rest = [each for each in given if not re.match("(model|method|image|prompt|source_prompt)=", each)]
    with gr.Blocks(title="palimpsest", analytics_enabled=False) as blocks, gr.Row():
        with gr.Column() as left:
            picture = gr.ImageMask(
                str(find(first[0])), type="pil", label="picture and mask", height=360,
                interactive=True, transforms=[], sources=["upload", "clipboard"], brush=gr.Brush(8, ["#ff00ff80"]),
            )  # fmt: skip
            prompt = gr.Textbox(first[1], label="prompt", info="what the edited picture should show")
            source = gr.Textbox(first[2], label="source prompt", info="what it shows now; some methods need it")
            with gr.Row():
                method, model = (gr.Dropdown(options(g), value=chosen[g], label=g) for g in ("method", "model"))
            more = gr.Textbox(shlex.join(rest), label="more settings", placeholder="seed=1 model.weights=PATH fit=keep")
        with gr.Column():
            button = gr.Button("Edit", variant="primary")
            gallery = gr.Gallery(show_label=False, format="png", columns=3, interactive=False)
            slider, axis = gr.Slider(0, 1, step=0.05, visible=False), gr.State()
            notes, command = gr.Markdown(), gr.Textbox(label="the same from a shell", buttons=["copy"])
            gr.Examples(examples, [picture, prompt, source], examples_per_page=5)

    def load(changes: tuple, path: Path, **how):
        if (key := repr((changes, path, how))) not in kept:  # `changes` are what edit.py makes of the model
            kept.clear()  # before the next model needs its memory
            kept[key] = models.load(path, **how)
        return kept[key]

    def edited(drawn: dict | None, old: list, typed: list[str]) -> list:
        """Edit the picture under the settings `typed`, and show it beside `old` edits."""
        if not drawn or not drawn["background"]:
            raise InputError("choose a picture")
        place = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
        place.mkdir(parents=True)
        masks = [paint.getchannel("A").point(lambda alpha: 255 * (alpha > 0)) for paint in drawn["layers"]]
        for name, image in (("image", drawn["background"]), *(("mask", mask) for mask in masks if mask.getbbox())):
            image.save(place / f"{name}.png")
            typed.append(f"{name}={place / name}.png")
        own, choices, _ = composed(["logger.mode=disabled", *typed])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            edit.edit(own, place, choices, partial(load, (own.compile, own.channels_last)))
        rows = report.run_rows(place)
        names = [name for name in rows[0] if name.startswith("edit.")]
        shown = old or [(place / rows[0][name], name) for name in ("input", "reconstruction") if name in rows[0]]
        shown += [(place / row["file"], report.describe(row, names)) for row in rows]
        lines = [f"**{each.message}**" for each in caught] + [report.scores(row, "file") for row in rows]
        shares = {n: v for n, v in rows[-1].items() if n in names and isinstance(v, float) and 0 <= v <= 1}
        name, value = next(iter(shares.items()), ("", 0))
        again = gr.Slider(label=f"another edit, with another {name[5:]}", value=value, visible=bool(name))
        words = " ".join("=".join(map(shlex.quote, each.split("=", 1))) for each in typed)
        return [shown, again, f"method{name[4:]}", "\n\n".join(lines), f"python edit.py {words}"]

    with blocks, left:
        @gr.render([method, model])
        def fields(*own: str) -> None:
            """A field for each main setting, and the listener that reads them."""
            with gr.Row():
                boxes = {name: field(name, *of) for name, of in settings(*own).items()}
            how = {"outputs": [gallery, slider, axis, notes, command], "show_progress_on": gallery}
            how["inputs"] = {picture, prompt, source, method, model, more, gallery, slider, axis, *boxes.values()}

            @gr.on([button.click, slider.release], concurrency_id="edit", **how)
            def listener(values, event: gr.EventData, progress=gr.Progress(track_tqdm=True)):
                boxed = {"method": method, "model": model, "prompt": prompt, "source_prompt": source}
                boxed |= {name: box for name, box in boxes.items() if values[box] != box.value}
                typed = [f"{name}={values[box]}" for name, box in boxed.items()]
                slid = isinstance(event.target, gr.Slider)
                try:
                    typed += [*shlex.split(values[more]), *([f"{values[axis]}={values[slider]}"] if slid else [])]
                    return edited(values[picture], values[gallery] if slid else [], typed)
                except Exception as error:  # one of the user's is a line, any other is printed too
                    line = cli.explain(error)
                    raise gr.Error(line or repr(error), duration=None, print_exception=not line) from error

    return blocks


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        cli.end(__doc__, 0)
    cli.run(lambda: page(sys.argv[1:]).launch())
