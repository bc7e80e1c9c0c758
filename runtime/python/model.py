"""A bundle, opened and ready to answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorgnette.bundle import Bundle, open_bundle
from lorgnette.errors import BundleError, RequestError
from lorgnette.manifest import Manifest
from lorgnette.runtime.chat import Chat
from lorgnette.runtime.engines import open_engine
from lorgnette.runtime.generation import Generation, Request, as_tuple
from lorgnette.runtime.interface import check_interface
from lorgnette.runtime.pictures import PictureCache, PictureSource
from lorgnette.runtime.sampler import SamplingParams
from lorgnette.runtime.threads import kept_threads, usable_cores
from lorgnette.runtime.tokenizer import Tokenizer

TOKENIZER = "tokenizer/tokenizer.json"


class Model:
    """What `lorgnette.open` returns. May be used from several threads, one answer at a time each.

    Attributes:
        bundle: The bundle behind it.
        manifest: Its manifest.
        engine: What executes its graphs.
        tokenizer: Its tokenizer.
        keep_vision: Whether the vision encoder stays in memory between pictures.
        pictures: Image tokens of the pictures seen last.
        load_ms: What opening took.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        keep_vision: bool = True,
        prefill_weights: bool = True,
        wait: bool = True,
    ) -> None:
        """Checks the files and loads the graphs, side by side.

        Args:
            bundle: The bundle.
            threads: Threads of the engine; None takes what `lorgnette profile --keep-threads` found
                fastest here, or else every core this process may use.
            keep_vision: Keeps the vision encoder in memory between pictures. Without, each
                question with new pictures loads it again.
            prefill_weights: Makes a second form of the decoder's weights, a byte for each number,
                when a prompt first has as many new positions as the bundle says, and keeps it:
                such prompts are then read in about three quarters of the time. Without, less
                memory.
            wait: Returns only when every graph is loaded. Without, the files are checked, and what
                the engine refuses of a graph is told when it is first needed: a picture is then
                encoded while the decoder is still loading.

        Raises:
            BundleError: A file was changed, or the engine refuses a graph.
            RequestError: `threads` is not positive.
        """
        started = time.perf_counter()
        if threads is not None and threads < 1:
            raise RequestError("threads is out of range", got=threads, wanted="1 or more")
        self.bundle = bundle
        check_interface(bundle)
        with ThreadPoolExecutor(max_workers=1) as pool:
            # Reading the files for their digests also brings them into memory for the engine.
            digests = pool.submit(bundle.check_digests)
            try:
                self.tokenizer = Tokenizer.from_file(bundle.file(TOKENIZER))
                self.engine = open_engine(bundle, threads or kept_threads(bundle) or usable_cores())
                if not prefill_weights:
                    self.engine.without_prefill_weights()
                if wait:
                    self.engine.wait()
            finally:
                digests.result()
        _check_tokenizer(self.tokenizer, bundle)
        self.keep_vision = keep_vision
        self.pictures = PictureCache()
        self.load_ms = (time.perf_counter() - started) * 1e3

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.bundle.manifest

    def generate(
        self,
        images: PictureSource | Sequence[PictureSource] = (),
        prompt: str = "",
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        system: str | None = None,
        task: str | None = None,
    ) -> Generation:
        """Answers one question about pictures.

        Args:
            images: One picture or several: files, bytes, Pillow pictures or uint8 `[H, W, 3]`.
            prompt: The question; the pictures stand before it.
            max_new_tokens: The most tokens of the answer.
            temperature: 0 for the likeliest token each time, higher for more variety.
            top_k: How many of the likeliest tokens to choose from, 0 for all.
            top_p: The share of probability to choose from, 1 for all.
            repetition_penalty: Above 1 makes repeating less likely.
            seed: Same seed, same answer.
            stop: A string or several that end the answer.
            system: A system message, where the chat template has a place for one.
            task: A fixed request of the model, such as `ocr`, in place of a prompt; it takes
                exactly one picture.

        Returns:
            An iterator over pieces of text; `result()` has the whole and the timings. Errors of
            pictures and prompt come with the first piece.

        Raises:
            RequestError: A setting is out of range, or there is no such task.
        """
        request = Request(
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(temperature, top_k, top_p, repetition_penalty, seed),
            stop=as_tuple(stop),
        )
        several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
        pictures: Sequence[PictureSource] = images if several else (images,)  # type: ignore[assignment]
        return self.chat(system).send(prompt, pictures, request, task=task)

    def chat(self, system: str | None = None) -> Chat:
        """Starts a conversation with a KV cache of its own."""
        return Chat(self, system)


def open_model(
    path: str | Path,
    *,
    threads: int | None = None,
    keep_vision: bool = True,
    prefill_weights: bool = True,
    wait: bool = True,
) -> Model:
    """Opens a bundle.

    Args:
        path: A `.lorg` directory.
        threads: Threads of the engine; None takes the number that was kept: see `Model`.
        keep_vision: Keeps the vision encoder in memory between pictures: see `Model`.
        prefill_weights: Keeps a second form of weights for long prompts: see `Model`.
        wait: Returns only when every graph is loaded: see `Model`.

    Raises:
        BundleError: The bundle is missing, damaged, hostile, or made for a newer reader.
        RequestError: `threads` is not positive.
    """
    return Model(
        open_bundle(path),
        threads,
        keep_vision=keep_vision,
        prefill_weights=prefill_weights,
        wait=wait,
    )


def _check_tokenizer(tokenizer: Tokenizer, bundle: Bundle) -> None:
    spec, prompt = bundle.manifest.spec, bundle.manifest.prompt
    if prompt.answer_header and not tokenizer.encode(prompt.answer_header):
        raise BundleError(
            "the tokenizer makes no tokens of the answer's header",
            where=bundle.path,
            got=repr(prompt.answer_header),
        )
    if tokenizer.token_id(prompt.image.image_token) != spec.image_token_id:
        raise BundleError(
            "the tokenizer has another image token than the manifest",
            where=bundle.path,
            got=tokenizer.token_id(prompt.image.image_token),
            wanted=spec.image_token_id,
        )
    if tokenizer.vocab_size > spec.text.vocab_size:
        raise BundleError(
            "the tokenizer has more tokens than the model",
            where=bundle.path,
            got=tokenizer.vocab_size,
            wanted=f"<= {spec.text.vocab_size}",
        )
