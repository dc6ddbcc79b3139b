"""Policy: any diffusers pipeline, driven through the seam in its own denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tiller.kernels import Kernel
from tiller.policy import calling, memo, noise, seam, upkeep, weights
from tiller.policy.forward import ForwardProcess
from tiller.policy.recorder import Recorder
from tiller.policy.replayer import Finished, Replayer
from tiller.policy.rollout import Rollout, Step
from tiller.policy.unroll import Unroller
from tiller.types import PipelineError


class Policy:
    """A diffusers pipeline as a policy: `sample` records a call, `replay` walks it again with gradients.

    Args:
        pipe: any `DiffusionPipeline`. It stays a live, ordinary pipeline, here as `policy.pipe`.
        lora_rank: rank of the LoRA adapters put into every denoiser; None trains all of the denoisers' weights.
        lora_alpha: scale of the adapters; the rank by default, so that they act with weight 1.
        target_modules: names of the linear layers that get an adapter; by default the attention projections.
        mixed_precision: "bf16" runs the models under autocast. Transitions are computed in float32 always.
        seed: of the adapters' initial values.

    Raises:
        PipelineError: the pipeline has no scheduler or no denoiser, or no layer by the names in `target_modules`.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        lora_rank: int | None = 16,
        lora_alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        mixed_precision: Literal["no", "bf16"] = "no",
        seed: int = 0,
    ):
        self.pipe: Any = pipe
        self.mixed_precision = mixed_precision
        seam.inspect_schedulers(pipe)
        self.denoisers = weights.denoisers(pipe)
        if not self.denoisers:
            raise PipelineError(f"{type(pipe).__name__} has no denoiser (a diffusers model inside its loop) to train.")
        for module in seam.parts(pipe, nn.Module).values():
            module.requires_grad_(False).eval()
        self.lora_rank = lora_rank
        if lora_rank is None:
            for module in self.denoisers.values():
                module.requires_grad_(True)
        else:
            weights.add_lora(self.denoisers, lora_rank, lora_alpha or lora_rank, target_modules, seed)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        lora_rank: int | None = 16,
        lora_alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        mixed_precision: Literal["no", "bf16"] = "no",
        seed: int = 0,
        device: str | torch.device | None = None,
        **loading: Any,
    ) -> Policy:
        """`DiffusionPipeline.from_pretrained` with safetensors only and no remote code, and a `Policy` around it.

        `loading` goes to diffusers as it is: dtype, revision, variant, ...
        """
        from tiller.policy.loading import load_pipeline

        pipe: Any = load_pipeline(name_or_path, **loading)
        if device is not None:
            pipe.to(device)
        return cls(pipe, lora_rank, lora_alpha, target_modules, mixed_precision, seed)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in a fixed order: the adapters', or the denoisers'."""
        return {
            f"{part}.{name}": parameter
            for part, module in self.denoisers.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        samples: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        kernel: Kernel | None = None,
        keep_means: bool = False,
        **call: Any,
    ) -> Rollout:
        """Call the pipeline unchanged, drawing every transition from `kernel`, and record the path.

        Args:
            prompts: one per picture; None for pipelines without prompts, or with the prompts already in `call`.
            seed: with each prompt and its sample index, keys all of a picture's noise.
            samples: the sample indices, one per prompt; by default 0, 1, 2 ... among equal prompts.
            starts: what keys the initial noise in the place of `samples`: equal numbers start equal prompts alike.
            kernel: how to draw; by default the scheduler's own noise, or DDIM(1) / FlowSDE(0.7) where it has none.
                A kernel without noise leaves the pipeline's own solver alone.
            keep_means: keep the means of the transitions, for `step.old_mean`.
            call: the pipeline's own call arguments (num_inference_steps, guidance_scale, height, image ...).

        Returns:
            The pictures, as the pipeline returned them, and everything that `replay` needs.
        """
        texts, call = calling.batch(prompts, call)
        indices = tuple(samples) if samples is not None else calling.occurrences(texts)
        if len(indices) != len(texts):
            raise ValueError(f"got {len(indices)} sample indices for {len(texts)} prompts; give one per prompt")
        keyed = tuple(starts) if starts is not None else indices
        recorder = Recorder(kernel, len(texts), noise.generators("steps", seed, texts, indices), keep_means)
        state = calling.random_state(call)
        embeddings: dict[Any, Any] = {}
        swap = kernel is None or not kernel.deterministic
        with torch.no_grad(), self._driven(recorder, embeddings, swap), recorder.taint:
            output = calling.run(self.pipe, call, seed, texts, keyed, state, self.mixed_precision)
        if not recorder.records:
            raise PipelineError(
                f"{type(self.pipe).__name__} never called scheduler.step, so there is nothing to train; use a pipeline "
                "of the same model that does."
            )
        return Rollout(
            images=output[0],
            records=tuple(recorder.records),
            prompts=texts,
            samples=indices,
            seed=seed,
            kernel=kernel or recorder.records[0].kernel,
            call=call,
            forwards=recorder.finished_forwards(),
            embeddings=embeddings,
            random_state=state,
            asides=frozenset(recorder.asides),
            guiding=frozenset(recorder.guiding),
            starts=keyed,
        )

    def replay(self, rollout: Rollout, on_step: Callable[[Step], None], steps: Sequence[int] | None = None) -> None:
        """Walk the recorded path again, showing each wanted step to `on_step` with the model's graph attached.

        `on_step` may call `step.backward(loss)` there and then: the graph of one step only is ever held. Denoisers
        are not run at steps that are not wanted; nothing is decoded. Under `torch.no_grad()` there is no graph at all.

        Args:
            steps: indices into the rollout's T steps; by default those that have a density.
        """
        self._walk(rollout, on_step, rollout.steps if steps is None else steps, None)

    def predict(
        self, rollout: Rollout, on_step: Callable[[Step], None], path: Callable[[int], Tensor], steps: Sequence[int]
    ) -> None:
        """As `replay`, but at each wanted step k ≥ 1 the latents are `path(k)` in place of the recorded ones.

        `step.prediction` is then the model's output at any state. At k = 0 the state is noise that the pipeline draws:
        the recorded one, or under a `ForwardProcess`, whose steps know their clean latents and their noise, fresh one.
        """
        if not isinstance(path, ForwardProcess):
            return self._walk(rollout, on_step, steps, path)
        self._walk(rollout, lambda step: on_step(path.explain(step)), steps, path, start=f"start {path.fresh}")

    def unroll(self, rollout: Rollout, start: int, stop: int | None = None, state: Tensor | None = None) -> Tensor:
        """The rollout's pictures (B, C, H, W) in [0, 1] with the graph of steps `start` and later.

        Earlier steps are forced to the recorded path, and no denoiser runs in them; later ones draw the recorded
        noise, so that with unchanged weights the pictures are the recorded ones. The graph holds all live steps.

        Args:
            stop: the step at which to jump to the decoder with x̂0; by default all steps are taken.
            state: (B, ...) latents at step `start` in the place of the recorded ones; then `start` is at least 1, and
                T is the decoder: the pictures of these clean latents.

        Raises:
            PipelineError: the pipeline cannot return its pictures as tensors with a graph.
        """
        total = len(rollout.records)
        decodes = start == total and stop is None and state is not None
        if not (decodes or 0 <= start < (stop or total) <= total) or (state is not None and not start):
            raise ValueError(f"steps {start} to {stop} are no part of the rollout's {total} steps")
        handler = Unroller(rollout, start, stop, state)
        call = {**rollout.call, "output_type": "pt"}
        key = (rollout.seed, rollout.prompts, rollout.starts or rollout.samples, rollout.random_state)
        with (
            seam.differentiable(self.pipe),
            self._driven(handler, rollout.embeddings, not rollout.kernel.deterministic),
        ):
            pictures = calling.run(self.pipe, call, *key, self.mixed_precision)[0]
        if not isinstance(pictures, Tensor) or (torch.is_grad_enabled() and not pictures.requires_grad):
            raise PipelineError(
                f"{type(self.pipe).__name__} returns no pictures that a gradient can flow through; train it with an "
                "algorithm that needs the reward's value only, such as ddpo."
            )
        return pictures.to(torch.promote_types(pictures.dtype, torch.float32))

    def stock(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        samples: Sequence[int] | None = None,
        **call: Any,
    ) -> Any:
        """The pipeline's own output, its scheduler untouched, from the noise that `sample` starts with."""
        texts, call = calling.batch(prompts, call)
        indices = tuple(samples) if samples is not None else calling.occurrences(texts)
        with torch.no_grad():
            state = calling.random_state(call)
            return calling.run(self.pipe, call, seed, texts, indices, state, self.mixed_precision)[0]

    def save(self, path: str | Path) -> Path:
        """Write what was learned: a LoRA that `pipe.load_lora_weights(path)` loads, or the whole pipeline's folder."""
        return weights.save(self, Path(path))

    def base(self) -> Any:
        """A context in which the adapters are off: the model as it was before training."""
        return weights.adapters_off(self.denoisers)

    def _walk(
        self,
        rollout: Rollout,
        on_step: Callable[[Step], None],
        steps: Sequence[int],
        path: Callable[[int], Tensor] | None,
        start: str = "start",
    ) -> None:
        unknown = [step for step in steps if not 0 <= step < len(rollout.records)]
        if unknown:
            raise ValueError(f"steps {unknown} are outside the rollout's {len(rollout.records)} steps")
        if not len(steps):
            return
        replayer = Replayer(rollout, on_step, steps, path, type(self.pipe).__name__)
        swap = not rollout.kernel.deterministic
        key = (rollout.seed, rollout.prompts, rollout.starts or rollout.samples, rollout.random_state)
        with seam.differentiable(self.pipe), self._driven(replayer, rollout.embeddings, swap):
            try:
                calling.run(self.pipe, rollout.call, *key, self.mixed_precision, start)
            except Finished:
                return
        raise PipelineError(
            f"{type(self.pipe).__name__} took fewer steps in replay ({replayer.index}) than when recorded "
            f"({len(rollout.records)}); it cannot be trained."
        )

    @contextmanager
    def _driven(
        self, handler: Recorder | Replayer | Unroller, embeddings: dict[Any, Any], swap: bool
    ) -> Iterator[None]:
        """The handler in every scheduler's step and every denoiser's forward; text encoded once."""
        with ExitStack() as stack:
            stack.enter_context(upkeep.kept(self.pipe))
            if swap:
                stack.enter_context(calling.one_call_per_step(self.pipe))
            for scheduler in seam.schedulers(self.pipe).values():
                stack.enter_context(seam.step_handled(scheduler, handler.step))
            for name, module in weights.loop_modules(self.pipe).items():
                stack.enter_context(seam.forward_handled(module, handler.forward(name)))
            stack.enter_context(memo.memoised(self.pipe, embeddings))
            yield
