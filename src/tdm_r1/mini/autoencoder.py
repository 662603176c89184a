"""The mini world's autoencoder: diffusers' `AutoencoderTiny`, 8x down, 8 channels, latents standardised.

`AutoencoderTiny` rather than `AutoencoderKL`: at 64x64 on a CPU it decodes twice as fast for the same pictures, and
`StableDiffusion3Pipeline` takes either (it is what TAESD3 uses). Its full-resolution stages are kept almost empty.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from ..settings import Settings

LATENT_CHANNELS = 8


class AutoencoderConfig(Settings):
    """How the mini autoencoder is trained. Ours, measured in `docs/notes` unless said."""

    steps: int = 2400
    batch_size: int = 64
    learning_rate: float = 1.5e-3  # with clipping at 1; a prototype diverged at 2e-3 without
    warmup_steps: int = 100
    decoder_steps: int = 700  # then the decoder alone, on the finished latents, for crisper outlines
    latent_noise: float = 0.15  # standard deviation added to the standardised latents, so that decoding is robust
    pool_size: int = 40_000  # renders, visited in random order


def build_autoencoder(channels: int = 32) -> AutoencoderTiny:
    """A fresh `AutoencoderTiny`: [B, 3, 64, 64] in [-1, 1] to latents [B, 8, 8, 8] and back."""
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(0, 1, 1, 2),
        num_decoder_blocks=(3, 2, 1, 0),
        latent_channels=LATENT_CHANNELS,
    ).to(memory_format=torch.channels_last)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return x.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1.0


def train_autoencoder(
    vae: AutoencoderTiny,
    images: np.ndarray,
    config: AutoencoderConfig,
    *,
    seed: int,
    bf16: bool,
    on_step: Callable[[int, float], None],
) -> None:
    """Trains ``vae`` in place on ``images`` (uint8 [N, 64, 64, 3]) and folds the latents' standardisation into it."""
    rng = np.random.default_rng([seed, 1])
    noise = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)

    def rate(step: int) -> float:
        return min((step + 1) / config.warmup_steps, 1.0) * max(1.0 - step / config.steps, 0.02)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(config.steps):
        x = to_pixels(images[rng.integers(len(images), size=config.batch_size)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z = norm(vae.encoder(x).float())
            z = z + config.latent_noise * torch.randn(z.shape, generator=noise)
            y = vae.decoder(z)
        error = y.float() - x
        loss = error.square().mean() + 0.5 * error.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, float(loss.detach()))
    _fold_standardisation(vae, images[:4096])


def sharpen_decoder(
    vae: AutoencoderTiny,
    images: np.ndarray,
    config: AutoencoderConfig,
    *,
    seed: int,
    bf16: bool,
    on_step: Callable[[int, float], None],
) -> None:
    """Trains the decoder on, in place, with the encoder (and so the latents) left as it is."""
    rng = np.random.default_rng([seed, 2])
    noise = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    vae.to(memory_format=torch.channels_last)
    for step in range(config.decoder_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / config.warmup_steps, 1.0) * (1 - step / config.decoder_steps)
        x = to_pixels(images[rng.integers(len(images), size=config.batch_size)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():  # the encoder is finished
                z = vae.encoder(x).float()
            # half of the pictures without noise, so that clean latents give clean outlines
            level = config.latent_noise * (torch.arange(len(z)) % 2)[:, None, None, None]
            y = vae.decoder(z + level * torch.randn(z.shape, generator=noise))
        error = y.float() - x
        loss = error.square().mean() + error.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        on_step(config.steps + step, float(loss.detach()))


@torch.no_grad()
def _fold_standardisation(vae: AutoencoderTiny, images: np.ndarray) -> None:
    """Rescales the encoder's last convolution so that its own output has mean 0 and deviation 1 per channel."""
    z = encode(vae, images)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    last = vae.encoder.layers[-1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: np.ndarray, batch_size: int = 256) -> Tensor:
    """uint8 [N, 64, 64, 3] to latents [N, 8, 8, 8], float32."""
    chunks = [vae.encoder(to_pixels(images[i : i + batch_size])) for i in range(0, len(images), batch_size)]
    return torch.cat(chunks).contiguous()


@torch.no_grad()
def reconstruction_error(vae: AutoencoderTiny, images: np.ndarray) -> float:
    """Root mean squared error of encode-decode in 8-bit levels."""
    x = to_pixels(images)
    return float(F.mse_loss(vae.decoder(vae.encoder(x)).clamp(-1, 1), x).sqrt() * 127.5)
