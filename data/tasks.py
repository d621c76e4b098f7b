"""What is to be edited: one picture with a prompt, or later a benchmark of many.

`conf/task/NAME.yaml` names a class with `tasks(size, multiple)`, which yields EditTasks of about `size` x `size` pixels
whose sides are multiples of what the model needs. Bad input is noticed when the class is constructed, before any model
is loaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from data.images import FITS, fit_picture, open_rgb, to_tensor
from errors import InputError


@dataclass
class EditTask:
    """One edit. `image`, `truth` (1, 3, H, W) in [-1, 1]; `mask` (1, 1, H, W), 1 where the edit belongs."""

    image: Tensor
    prompt: str  # what the edited picture should show
    source_prompt: str = ""  # what the picture shows now; "" where nobody said
    name: str = "edit"
    mask: Tensor | None = None
    truth: Tensor | None = None  # the correct result, where it is known


class OneImage:
    """The user's own picture, or the bundled `example` (image, prompt, source_prompt) where none is named."""

    def __init__(
        self,
        image: str | None,
        prompt: str | None,
        source_prompt: str | None = None,
        fit: str = "crop",  # crop, pad or stretch to a square, or keep the shape
        example: dict[str, str] | None = None,
    ):
        if image is None and example:
            image = example["image"]
            if prompt is None:
                prompt = example["prompt"]
                source_prompt = example.get("source_prompt") if source_prompt is None else source_prompt
        if image is None:
            raise InputError("image is missing: name the picture to edit, for example image=dog.jpg")
        self.prompt = "" if prompt is None else str(prompt).strip()
        if not self.prompt:
            raise InputError('prompt is empty: say what the picture should show, prompt="a dog on a blue background"')
        self.source_prompt = "" if source_prompt is None else str(source_prompt).strip()
        if fit not in (*FITS, "keep"):
            raise InputError(f"fit={fit} is unknown: choose from {', '.join(FITS)}, keep")
        self.fit = fit
        self.picture = open_rgb(str(image))

    def tasks(self, size: int, multiple: int = 1) -> Iterable[EditTask]:
        image = to_tensor(fit_picture(self.picture, size, self.fit, multiple))
        yield EditTask(image, self.prompt, self.source_prompt)
