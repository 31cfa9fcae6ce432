"""How good a reconstruction is, per domain. Arrays are in the stored form of `preprocess`; all numpy, on the host."""

from __future__ import annotations

import numpy as np

from fm4m.tokenizers.config import VQConfig


def psnr_of_each(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of every image in dB, uint8 [B, H, W, C] -> float64 [B]."""
    error = np.mean((target.astype(np.float64) - prediction.astype(np.float64)) ** 2, axis=(1, 2, 3))
    return 10.0 * np.log10(255.0**2 / np.maximum(error, 1e-8))


def psnr(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, uint8 [B, H, W, C]."""
    return float(np.mean(psnr_of_each(target, prediction)))


def align_scale_shift(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Least-squares scale and shift per image that map prediction onto target, float [B, H, W] -> f64 [B, H, W]."""
    p = prediction.astype(np.float64)
    t = target.astype(np.float64)
    p_mean, t_mean = p.mean((1, 2), keepdims=True), t.mean((1, 2), keepdims=True)
    covariance = ((p - p_mean) * (t - t_mean)).mean((1, 2), keepdims=True)
    variance = ((p - p_mean) ** 2).mean((1, 2), keepdims=True)
    return (p - p_mean) * (covariance / np.maximum(variance, 1e-12)) + t_mean


def abs_rel(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean of |aligned prediction - target| / target over all pixels; target in metres, > 0."""
    return float(np.mean(np.abs(align_scale_shift(target, prediction) - target) / np.maximum(target, 1e-6)))


def angles(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Angles in degrees between two maps of normals stored as uint8 [B, H, W, 3]: float64 [B, H, W]."""
    a, b = (x.astype(np.float64) / 127.5 - 1.0 for x in (target, prediction))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.sum(a * b, axis=-1) / np.maximum(norms, 1e-9)
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def mean_angle(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean of `angles`."""
    return float(angles(target, prediction).mean())


def confusion(target: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [classes, classes]: pixels of each true class (rows) by predicted class, of ids [B, H, W]."""
    pairs = target.astype(np.int64).ravel() * num_classes + prediction.astype(np.int64).ravel()
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(counts: np.ndarray) -> float:
    """Mean intersection over union over the classes present in the target, from a `confusion`."""
    hit, present = np.diag(counts), counts.sum(1)
    union = present + counts.sum(0) - hit
    return float((hit / np.maximum(union, 1))[present > 0].mean())


def segmentation(target: np.ndarray, prediction: np.ndarray, num_classes: int) -> tuple[float, float]:
    """(`mean_iou`, pixel accuracy) of ids [B, H, W]."""
    counts = confusion(target, prediction, num_classes)
    return mean_iou(counts), float(np.diag(counts).sum() / max(counts.sum(), 1))


def mask_iou(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean over masks [B, H, W] of the intersection over union of what is not 0; 1 where both are empty."""
    a, b = target > 0, prediction > 0
    union = (a | b).sum((1, 2))
    return float(np.where(union > 0, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0).mean())


def cosine(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean cosine similarity over the last axis."""
    a, b = target.astype(np.float64), prediction.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float((np.sum(a * b, axis=-1) / np.maximum(norms, 1e-12)).mean())


def measure(config: VQConfig, stats: dict, target: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """The domain's numbers by name: psnr_db | abs_rel | angle_deg | miou, pixel_accuracy | iou | cosine | cosine, rmse.

    Features and vectors are compared after standardisation: their common mean alone would give a high cosine. The
    error of vectors is in standard deviations.
    """
    if config.domain == "rgb":
        return {"psnr_db": psnr(target, prediction)}
    if config.domain == "edges":
        return {"psnr_db": psnr(target[..., None], prediction[..., None])}
    if config.domain == "mask":
        return {"iou": mask_iou(target, prediction)}
    if config.domain == "depth":
        return {"abs_rel": abs_rel(target, prediction)}
    if config.domain == "normal":
        return {"angle_deg": mean_angle(target, prediction)}
    if config.domain == "semseg":
        miou, accuracy = segmentation(target, prediction, config.num_classes)
        return {"miou": miou, "pixel_accuracy": accuracy}
    standardised = [(x.astype(np.float64) - stats["mean"]) / stats["std"] for x in (target, prediction)]
    numbers = {"cosine": cosine(*standardised)}
    if config.domain == "vector":
        numbers["rmse"] = float(np.sqrt(np.mean((standardised[0] - standardised[1]) ** 2)))
    return numbers
