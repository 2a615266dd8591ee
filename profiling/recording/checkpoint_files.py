"""The files of a Hugging Face checkpoint folder, checked before anything heavy is loaded and without executing any."""

from pathlib import Path

from moeplace.profiling.containers.safetensors_file import check_safetensors
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import read_json

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")


def check_checkpoint(folder: str | Path) -> Path:
    """The folder of a complete safetensors checkpoint.

    Raises:
        InputError: there is no such folder, or it has pickled weights only.
        FormatError: the configuration or a weight file is missing, damaged or truncated.
    """
    path = Path(folder)
    if path.is_file():
        raise InputError(f"{folder} is a file, a checkpoint folder is needed")
    if not path.is_dir():
        raise InputError(f"no such checkpoint folder: {folder} (models are read from disk, nothing is downloaded)")
    if not (path / "config.json").is_file():
        raise FormatError(f"{folder} is not a checkpoint folder: it has no config.json")
    config = read_json(path / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FormatError(f"{path / 'config.json'} is not a model configuration: it names no model_type")
    for shard in weight_files(path):
        check_safetensors(shard)
    return path


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, from the index where there is one.

    Raises:
        InputError: the weights are pickled.
        FormatError: files are missing.
    """
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise FormatError(f"{folder / _INDEX} is not a weight index: it has no weight_map of file names")
        shards = [folder / name for name in sorted(set(names.values()))]
        for shard in shards:
            if shard.parent != folder or shard.suffix != ".safetensors":
                raise FormatError(f"{folder / _INDEX} names {shard.name!r}, which is no safetensors file of the folder")
            if not shard.is_file():
                raise FormatError(f"{folder / _INDEX} names {shard.name}, which is missing")
        return shards
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder} has pickled weights only ({pickles[0]}); safetensors are needed, pickle is refused"
            )
        raise FormatError(f"{folder} is not a checkpoint folder: it has no .safetensors file")
    return shards
