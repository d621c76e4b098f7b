"""Shared fixtures: a model small enough that every test can afford it, and the marks for what not every run can."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks gain nothing from threads; subprocesses inherit it

import hydra
import pytest
import torch
from safetensors.torch import load_file, save_file

if not torch.cuda.is_available():  # fused attention on the CPU: Triton reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import models
from data.tasks import EditTask
from evaluation import config
from files import CLONE
from methods.base import RECONSTRUCTION, Run, perform

TINY = {
    "image_size": 32,
    "prediction": "v",
    "unet": dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, num_head_channels=16, context_dim=32),
    "vae": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "patch": 2, "scale_factor": 1.0},
    "text": {"width": 32, "heads": 2, "layers": 2, "context_length": 24, "embed_dim": 32},
    "vision": {"image_size": 32, "width": 32, "heads": 2, "layers": 2, "patch": 8},
    "schedule": {"kind": "cosine"},
}
WITHOUT_CLIP = {name: part for name, part in TINY.items() if name != "vision"}


# Tiny Stable Diffusion checkpoints with outputs of an independent implementation.
FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def fixture_arch(name):
    """The sizes of a checkpoint in `FIXTURES`, for `models.load`."""
    arch = json.loads((FIXTURES / name / "arch.json").read_text())
    return {section: values for section, values in arch.items() if section not in ("guidance_scale", "flowedit")}


def tiny(name, **options):
    """The single file of a checkpoint in `FIXTURES` as a model, that of Stable Diffusion 3 with T5."""
    t5 = [*(FIXTURES / name).glob("t5.safetensors")]
    return models.load(FIXTURES / name / "model.safetensors", **({"arch": fixture_arch(name), "text": t5} | options))


def compose(program, *arguments, **options):
    """The settings of `edit.py` or `train.py` for the given arguments."""
    config.register()
    with hydra.initialize_config_dir(str(CLONE / "conf"), version_base="1.3"):
        return hydra.compose(program, list(arguments), **options)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def hub_folder(path, ending=".safetensors", prediction=None, name="sd1_tiny"):
    """A fixture in the hub's layout: its configs, and the single file's tensors under the names of its hub folder. A
    tensor is all of another, a third of it (0, 1, 2), its transpose (T), or has its halves exchanged (swap)."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = {"shift": 3.0} if name == "sd3_tiny" else betas | {"num_train_timesteps": 1000}
    scheduler |= {"prediction_type": prediction} if prediction else {}  # 1.4 states none
    (path / "scheduler").mkdir(parents=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    source = FIXTURES / name
    single, parts = {key: t for file in source.glob("*.safetensors") for key, t in load_file(file).items()}, {}
    for line in (source / "hub" / "names.txt").read_text().splitlines():
        place, key, *how = line.split()
        part, ours = place.split("/")
        tensor = single[key] if key in single else torch.eye(32)  # "identity"
        if how == ["swap"]:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        elif how:
            tensor = tensor.mT if how == ["T"] else tensor.chunk(3)[int(how[0])]
        linear = part == "vae" and ".attentions." in ours and tensor.ndim == 4
        parts.setdefault(part, {})[ours] = (tensor.flatten(1) if linear else tensor).contiguous()
    for part, tensors in parts.items():
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_bytes((source / "hub" / part / "config.json").read_bytes())
        save_file(tensors, path / part / f"{WEIGHTS.get(part, 'model')}{ending}")
    return path


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def latents(results):
    """The latents of the edits that the fixture `edit` gives, in one batch."""
    return torch.cat([latent for _, latent, _ in results[0]])


def randomised(model):
    """Give zero-initialised last layers some weight, so that every path through the networks matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_model():
    """A model with random weights: 32x32 pixels, 8x8 latents, predicting v. Tests must leave it as it is."""
    return randomised(models.build(TINY, seed=0))


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A small sentencepiece model with T5's special tokens."""
    from sentencepiece import SentencePieceTrainer

    file = tmp_path_factory.mktemp("t5") / "spiece.model"
    lines = ["a photo of a cat", "a red heart", "the quick brown fox jumps over the lazy dog"]
    sizes = dict(vocab_size=50, hard_vocab_limit=False, minloglevel=2)
    with open(file, "wb") as out:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **sizes
        )
    return file


@pytest.fixture
def write(tmp_path):
    """A function of tensors: a safetensors file of them."""

    def to_file(tensors, name="model", metadata=None):
        file = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file, metadata)
        return file

    return to_file


@pytest.fixture
def task():
    """An edit of a random picture for the tiny model."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return EditTask(image, "a red heart", "a cat")


@pytest.fixture
def edit():
    """A function (method, model, task, seed=0, run=None) -> (edits, reconstruction, run): each edit is
    (settings, latent, picture), the reconstruction (latent, picture) or None."""

    def of(method, model, task, seed=0, run=None):
        run = run or Run(seed)
        results = list(perform(method, model, task, run))
        edits = [result for result in results if result[0] != RECONSTRUCTION]
        again = [result[1:] for result in results if result[0] == RECONSTRUCTION]
        return edits, again[0] if again else None, run

    return of


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
