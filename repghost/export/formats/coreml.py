"""Core ML, for iOS and macOS: converted here, and run there only. Check: `pytest tests/test_export.py`."""

from importlib.metadata import version
from pathlib import Path

import torch

from repghost.errors import UserError, first_sentence
from repghost.export.deployable import Deployable, Metadata, example_input

LARGEST_BATCH = 64  # of a package that takes any; it needs a bound


def write(module: Deployable, path: Path, metadata: Metadata) -> None:
    """Writes a Core ML package (an ML program, for iOS 15 or macOS 12 and newer). Raises UserError where it cannot.

    module: in float32, whatever the metadata say: float16 is Core ML's own conversion. It has no uint8 tensors:
    photographs go in as float32 with the same values.
    """
    import coremltools

    deployment = module.deployment
    example = example_input(deployment).float()
    shape = example.shape if deployment.batch else (coremltools.RangeDim(1, LARGEST_BATCH), *example.shape[1:])
    try:
        converted = coremltools.convert(
            torch.jit.trace(module, example),
            convert_to="mlprogram",
            inputs=[coremltools.TensorType("image", shape)],
            outputs=[coremltools.TensorType(deployment.output)],
            compute_precision=coremltools.precision[str(metadata["precision"]).upper()],
        )
        converted.user_defined_metadata.update({key: str(value) for key, value in metadata.items()})
        converted.save(str(path))
    except Exception as error:  # its versions lag behind torch's, and what then fails is of any kind
        tools = f"coremltools {version('coremltools')}"
        raise UserError(
            f"{tools} cannot convert this with torch {version('torch')}: {first_sentence(error)}"
        ) from error
