"""A miniature PIE-Bench: three edits at 512 pixels, the presets of the published rows, and their table."""

import json
import re

import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

import edit as command
import models
from benchmarks import pie_bench
from data.benchmarks import PieBench
from tests.conftest import compose

ROWS = sorted(path.stem for path in pie_bench.PRESETS.glob("*.yaml"))
EDITS = [("a [cat] runs", "a [dog] runs", "cat dog", "1"), ("a cat", "a red cat", "", "6"), ("a dog", "a cat", "", "0")]
CHOICES = OmegaConf.create({"method": "an editor", "family": None})
TINY = ["model=openmoji64", "size=64", "sampler.steps=2", "metrics.fetch=false", "logger.mode=disabled"]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory, tiny_model):
    folder, items = tmp_path_factory.mktemp("pie"), {}
    (folder / "annotation_images").mkdir()
    for i, (source, target, words, kind) in enumerate(EDITS):
        picture = Image.effect_noise((512, 512), 60).convert("RGB")
        ImageDraw.Draw(picture).ellipse((100 * i, 100, 300, 400), fill=("red", "green", "blue")[i])
        picture.save(folder / "annotation_images" / f"{i}.jpg")
        items[f"00{i}"] = {"image_path": f"{i}.jpg", "original_prompt": source, "editing_prompt": target}
        items[f"00{i}"] |= {"editing_type_id": kind, "mask": [512 * 100, 512 * 200], "blended_word": words}
    (folder / "mapping_file.json").write_text(json.dumps(items))
    models.save(tiny_model, folder / "tiny")
    return folder


@pytest.mark.parametrize("row", [row for row in ROWS if row != "flowedit_sd35"])
def test_a_row_has_the_settings_that_were_published(row):
    cfg = compose("edit", f"+experiment=pie/{row}")
    inversion, editor = re.fullmatch(r"(.*)_(prompt_to_prompt|masactrl|plug_.*)", row).groups()
    plug = editor == "plug_and_play"  # whose rows are of another model, with its own grid
    assert cfg.method._target_.startswith(f"methods.{editor}.") and cfg.method.guidance_scale == 7.5
    of = {"ddim": "inversion"}.get(inversion, inversion.replace("_", ""))
    assert cfg.method.inversion._target_.lower().endswith(f".{of}")
    assert (cfg.sampler.steps, cfg.sampler.offset) == (50, int(plug)) and not cfg.task.confine
    assert ("v1-5" if plug else "v1-4") in cfg.model.weights


def test_the_table_has_published_and_reproduced_numbers(benchmark, tmp_path):
    assert PieBench(str(benchmark)).entries[0].blend_word == "cat dog"
    own = [f"task.path={benchmark}", f"model.weights={benchmark / 'tiny'}", f"cache.dir={tmp_path / 'cache'}"]
    for row in ("pnp_prompt_to_prompt", "ddim_masactrl", "ddim_plug_and_play"):
        few = ["method.start_step=1", "method.start_layer=1"] if "masactrl" in row else []
        cfg = compose("edit", f"+experiment=pie/{row}", *TINY, *own, *few)
        for _ in range(2):  # the second goes on, with nothing left
            assert command.edit(cfg, tmp_path / row, CHOICES)[1] == 0
    pie_bench.main(str(benchmark), tmp_path)
    lines = {line.split(" | ")[0][2:]: line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()}
    assert lines.keys() >= set(ROWS) and len(ROWS) == 9
    assert lines["ddim_masactrl"][1:3] == ["3", "28.38 / -"] and lines["ddim_prompt_to_prompt"][1] == "0"
    published, ours = map(float, lines["pnp_prompt_to_prompt"][3].split(" / "))
    assert published == 27.22 and 5 < ours < 60
    rows = [json.loads(line) for line in (tmp_path / "pnp_prompt_to_prompt" / "rows.jsonl").read_text().splitlines()]
    kept = 1 - sum(PieBench(str(benchmark)).load(e, 64).mask.mean() for e in PieBench(str(benchmark)).entries) / 3
    mse = sum(row["mse_to_input_kept"] for row in rows) / 3 * float(kept)
    assert float(lines["pnp_prompt_to_prompt"][5].split(" / ")[1]) == pytest.approx(1e4 * mse, rel=0.02)
