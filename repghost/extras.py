"""Which optional packages the project imports, and the extra of pyproject.toml that each comes with.

Check: `pytest tests/test_console.py`.
"""

from importlib.metadata import PackageNotFoundError, version

# Modules at the top level, as import statements name them; of the packages that all commands need under "".
EXTRAS = {
    "": ("torch", "torchvision", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "numpy",
         "matplotlib", "safetensors", "huggingface_hub", "filelock", "PIL", "tqdm", "omegaconf", "yaml"),
    "train": ("hydra", "webdataset", "wandb", "tensorboard", "sklearn", "scipy", "pyarrow", "braceexpand", "fsspec",
              "aiohttp", "nvidia", "pydantic", "pydantic_core", "faster_coco_eval", "isal"),
    "remote": ("s3fs", "gcsfs"),
    "distill": ("timm",),
    "sweep": ("hydra_plugins", "optuna", "submitit"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "executorch": ("executorch", "torchao"),
    "openvino": ("openvino", "nncf"),
    "coreml": ("coremltools",),
    "litert": ("litert_torch", "ai_edge_litert", "flatbuffers"),
    "ncnn": ("ncnn", "pnnx"),
    "tensorrt": ("tensorrt",),
}  # fmt: skip


def how_to_install(module: str) -> str | None:
    """The one line for a module that is missing; None for one that is no dependency of the project."""
    name = module.partition(".")[0]
    for extra, names in EXTRAS.items():
        if name in names:
            brackets = f"[{extra}]" if extra else ""
            return f"{name} is not installed: pip install '{_project()}{brackets}'"
    return None


def _project() -> str:
    """What pip calls the project: its name where it is installed, or the checkout that it is run from."""
    try:
        version("repghost")
    except PackageNotFoundError:
        return "."
    return "repghost"
