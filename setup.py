"""Packaging. The checkout has models/, datasets/ and configs/ at the top; an install puts them inside mgvideo."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("models", "datasets", "configs")


def installed_packages(folder: str) -> list[str]:
    """List the packages of a top-level folder by the names under which they are installed."""
    return [f"mgvideo.{folder}", *(f"mgvideo.{folder}.{name}" for name in find_packages(folder))]


setup(
    name="mgvideo",
    version="0.1.0",
    description="Train video networks several times faster with the multigrid method",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mgvideo", "mgvideo.*"]), *(p for f in FOLDERS for p in installed_packages(f))],
    package_dir={f"mgvideo.{folder}": folder for folder in FOLDERS},
    package_data={"mgvideo.configs": ["**/*.yaml"]},
    entry_points={"console_scripts": ["mgvideo = mgvideo.cli:command"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "iopath",
        "filelock>=4",
        # decord has no other wheels for Linux or current macOS. decord2 3.4 has, but torchcodec crashes on AV1 where it
        # was loaded before: its libdav1d replaces that of FFmpeg. PyAV, the default decoder, has wheels for all.
        "decord; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "hydra-core>=1.3",
        "tensorboard",
        "av>=17",
        "torchmetrics",
        "rich",
        "matplotlib",
        "psutil",
        "pillow",
        "safetensors",
    ],
    extras_require={
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "torchcodec": ["torchcodec"],
        "slurm": ["hydra-submitit-launcher"],
        "s3": ["boto3"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],  # what a run needs to log to a server; `mlflow` has the server and local databases
        "hub": ["huggingface_hub"],
        "camera": ["scikit-image"],  # the photographs of dataset=camera; nothing imports it
        "dev": [
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "build", "setuptools>=77"),
            *("boto3", "moto[s3]", "flask", "flask-cors"),  # an S3 server for the tests
            *("wandb", "mlflow-skinny", "huggingface_hub"),  # the tests run them offline or on a local server
            "fvcore",  # what the tests compare FLOPs and precise BN with
            "scikit-image",  # photographs
        ],
    },
)
