"""Packaging: the distribution `infinillm`, its extras, and protobuf code generated while it is built."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.findall(r'__version__ = "(.+?)"', (HERE / "infinillm/__init__.py").read_text(encoding="utf-8"))[0]


class BuildPy(build_py):
    """Generate *_pb2.py beside their .proto files, through the link infinillm/protos, before modules are collected."""

    def run(self):
        from grpc_tools import protoc

        protos = [str(path.relative_to(HERE)) for path in sorted((HERE / "infinillm/protos").glob("*.proto"))]
        if protoc.main(["protoc", "-I.", "--python_out=.", "--pyi_out=.", *protos]):
            raise SystemExit("protoc failed")
        super().run()


setup(
    name="infinillm",
    version=VERSION,
    description="Language models served from one pool of K/V memory that all workers share",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ and protos/ are top-level folders reached through two links; kernels/ must not be a package of its own.
    packages=[*find_packages(include=["infinillm", "infinillm.*"]), "infinillm.kernels", "infinillm.protos"],
    package_data={
        "infinillm": ["py.typed"],
        "infinillm.kernels": ["cpu/*"],
        "infinillm.protos": ["*.proto", "*.pyi"],
        "infinillm.console": ["assets/*"],
        "infinillm.sim": ["data/*"],
    },
    cmdclass={"build_py": BuildPy},
    entry_points={"console_scripts": ["infinillm = infinillm.__main__:main"]},
    install_requires=[
        "fastapi>=0.115",
        "gguf>=0.17",
        "grpcio>=1.76",
        "grpcio-health-checking>=1.76",
        "grpcio-reflection>=1.76",
        "httpx>=0.27",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "numpy>=1.26",
        "prometheus_client>=0.22",
        "protobuf>=6.31.1,<8",
        "pydantic>=2.7",
        "pyyaml>=6",
        "rich>=13.7",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "torch>=2.11",
        "transformers>=5",
        "uvicorn>=0.30",
    ],
    extras_require={
        "gpu": ["triton>=3.5"],
        "dev": [
            "accelerate>=1",
            "build>=1",
            "grpcio-tools>=1.76",
            "hypothesis>=6.100",
            "kubernetes-validate>=1.31",
            "matplotlib>=3.8",
            "mypy>=1.15",
            "openai>=1.60",
            "psutil>=6",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "ruff>=0.11",
            "setuptools>=77",
            "triton>=3.5; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",
            "types-protobuf",
            "types-PyYAML",
            "wheel",
        ],
        "bench": ["accelerate>=1", "openai>=1.60", "psutil>=6"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
