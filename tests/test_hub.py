"""The model hub's layout: which files of a repository are chosen, and how they are fetched. No network is used."""

import pytest

from errors import InputError
from models.hub import part_files

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
