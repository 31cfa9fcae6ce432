"""What `fm4m.masking.select` and `fm4m.spans` must do, one sample at a time, in plain Python lists. Slow on purpose."""

from __future__ import annotations

import numpy as np

from fm4m.batch import IMAGENET_MEAN, IMAGENET_STD, PackedBatch, RawBatch, Tokens
from fm4m.masking import Draws
from fm4m.masking_recipe import Masking
from fm4m.modalities import ModalitySet

SENTINEL_1, SENTINELS = 5, 199
ONE = np.float32(1)


def spans(ids, gap, budget_in, budget_out, keep_prob, uniforms, window):
    """One sequence. Returns the visible tokens, the target's tokens, and the whole target before it was cut."""

    def sentinel(k):
        return SENTINEL_1 - 1 + min(k, SENTINELS)

    def mask(kept):
        shown, target, k = [], [], 0
        for i, token in enumerate(ids):
            if kept[i]:
                shown.append(token)
                continue
            if i == 0 or kept[i - 1]:
                k += 1
                shown.append(sentinel(k) if gap is None else gap)
                target.append(("sentinel", sentinel(k)))
            target.append(("token", token))
        return shown, [*target, ("sentinel", sentinel(k + 1))]

    for attempt, row in enumerate(uniforms):
        q = np.float32(keep_prob) * np.float32(0.9) ** np.arange(len(uniforms), dtype=np.float32)[attempt]
        shown, target = mask([u <= q for u in row[: len(ids)]])
        if len(shown) <= budget_in:
            break
    else:
        shown, target = mask([False] * len(ids))
    if budget_in == 0:
        shown = []
    whole = [token for _, token in target]
    if len(target) <= budget_out:
        return shown, whole, whole
    at = [i for i, (what, _) in enumerate(target) if what == "sentinel"]
    candidates = at[:-1] or at
    start = candidates[min(int(np.floor(np.float32(window) * np.float32(len(candidates)))), len(candidates) - 1)]
    if len(target) - start < budget_out:
        start = next(i for i in at if len(target) - i <= budget_out)
    return shown, whole[start : start + budget_out], whole


def budgets(share, extra, budget, active):
    """Tokens of every modality on one side, before any cap."""
    if not any(active):
        return [0] * len(active)
    out = [int(np.floor(np.float32(s) * np.float32(budget))) for s in share]
    for j in range(int(budget) - sum(out)):
        if j < len(extra):
            out[extra[j]] += 1
    return out


def refill(tokens, free):
    total, out, seen = sum(free), [], 0
    tokens = max(0, min(tokens, total))
    for f in free:
        out.append(tokens * (seen + f) // max(total, 1) - tokens * seen // max(total, 1))
        seen += f
    return out


def components(masking: Masking, modalities: ModalitySet, tasks, task, component, length):
    """The component, and for each side which modalities can get tokens."""
    part = masking.components(tasks[task])[component]
    alphas = [list(part.concentration(side, modalities).values()) for side in ("inputs", "targets")]
    active = [[alpha > 0 and n > 0 for alpha, n in zip(side, length)] for side in alphas]
    return part, active


def sample(tokens, length, draws: Draws, masking: Masking, modalities: ModalitySet, part, active):
    """One sample. Returns (row, modality, position) of the encoder, that and the target of the decoder, and counts."""
    ms = modalities.modalities
    sequences = [i for i, m in enumerate(ms) if m.name in {*modalities.inputs, *modalities.outputs} and not m.grid]
    grids = [i for i, m in enumerate(ms) if m.name in {*modalities.inputs, *modalities.outputs} and m.grid]
    grids.sort(key=lambda i: ms[i].max_tokens)
    b_in = budgets(draws.share[0], draws.extra[0], draws.budget[0], active[0])
    b_out = budgets(draws.share[1], draws.extra[1], draws.budget[1], active[1])
    wanted = [min(b, m.max_tokens) for b, m in zip(b_in, ms)], [min(b, m.max_tokens) for b, m in zip(b_out, ms)]

    shown, asked, whole = {}, {}, {}
    for q, i in enumerate(sequences):
        m, scheme, p = ms[i], part.keep_scheme(ms[i].name), draws.keep_prob[q]
        p = {"random": p, "all": ONE, "binary": np.float32(0) if p < 0.5 else ONE}[scheme]
        gap, ids = None, tokens[modalities.slot_offset.get(m.name, 0) :][: length[i]].tolist()
        if m.kind == "embedding":
            gap, ids = m.max_tokens, list(range(length[i]))
        shown[i], asked[i], whole[i] = spans(
            ids, gap, wanted[0][i], wanted[1][i], p, draws.keep[q], draws.window[q]
        )

    take_in = [wanted[0][i] if ms[i].grid else 0 for i in range(len(ms))]
    if masking.refill:
        free = [m.max_tokens - take_in[i] if m.grid and active[0][i] else 0 for i, m in enumerate(ms)]
        spare = refill(int(draws.budget[0]) - sum(take_in) - sum(map(len, shown.values())), free)
        take_in = [a + b for a, b in zip(take_in, spare)]
    take_out = [min(wanted[1][i], m.max_tokens - take_in[i]) if m.grid else 0 for i, m in enumerate(ms)]
    if masking.refill:
        free = [m.max_tokens - take_in[i] - take_out[i] if m.grid and active[1][i] else 0 for i, m in enumerate(ms)]
        used = sum(take_out) + sum(max(len(t) - 1, 0) for t in asked.values())
        take_out = [a + b for a, b in zip(take_out, refill(int(draws.budget[1]) - used, free))]

    order, at = {}, 0
    for i in grids:
        n = ms[i].max_tokens
        drop = (n - 1).bit_length()
        order[i] = sorted(range(n), key=lambda c, at=at, drop=drop: (int(draws.cells[at + c]) >> drop, c))
        at += n

    encoder, decoder = [], []
    for i, m in enumerate(ms):
        position = modalities.position_offset[m.name]
        if m.grid:
            for cell in order[i][: take_in[i]]:
                if m.kind == "pixels":
                    row = modalities.continuous_offset[m.name] + cell
                else:
                    row = modalities.input_offset[m.name] + int(tokens[modalities.slot_offset[m.name] + cell])
                encoder.append((row, i, position + cell))
            for cell in order[i][take_in[i] : take_in[i] + take_out[i]]:
                code = int(tokens[modalities.slot_offset[m.name] + cell])
                decoder.append((0, i, position + cell, modalities.output_offset[m.name] + code))
        elif i in shown:
            first = {**modalities.input_offset, **modalities.continuous_offset}.get(m.name, 0)
            encoder += [(first + token, i, position + n) for n, token in enumerate(shown[i])]
            first = modalities.output_offset.get(m.name, 0)
            limit = m.max_positions or m.max_tokens
            for n, (token, following) in enumerate(zip(asked[i][:-1], asked[i][1:])):
                decoder.append((first + token, i, position + (n if n < limit else 0), first + following))
    counts = {"wanted": wanted, "order": order, "in": take_in, "out": take_out}
    return encoder, decoder, {**counts, "shown": shown, "asked": asked, "whole": whole}


def select(raw: RawBatch, draws: Draws, masking: Masking, modalities: ModalitySet, tasks: tuple[str, ...]):
    """The packed batch as numpy arrays, and the counts of every sample."""
    size, width, height = raw.size, masking.input_range[1], masking.target_range[1]
    encoder, decoder = np.zeros((3, size, width), np.int32), np.zeros((4, size, height), np.int32)
    valid = np.zeros((size, width), bool), np.zeros((size, height), bool)
    tokens, length, task = (np.asarray(x).astype(int) for x in (raw.tokens, raw.length, raw.task))
    fields = {k: np.asarray(v) for k, v in vars(draws).items()}
    counts = []
    for b in range(size):
        d = Draws(**{k: v[b] for k, v in fields.items()})
        part, active = components(masking, modalities, tasks, task[b], d.component, length[b])
        visible, asked, info = sample(tokens[b], length[b], d, masking, modalities, part, active)
        for n, values in enumerate(visible):
            encoder[:, b, n], valid[0][b, n] = values, True
        for n, values in enumerate(asked):
            decoder[:, b, n], valid[1][b, n] = values, True
        counts.append(info)
    packed = PackedBatch(
        Tokens(*encoder, valid[0]), Tokens(*decoder[:3], valid[1]), decoder[3], dense(raw, modalities, length)
    )
    return packed, counts


def dense(raw: RawBatch, modalities: ModalitySet, length):
    """The continuous inputs, patch by patch and vector by vector."""
    out = {}
    for name in modalities.continuous:
        m, values = modalities[name], np.asarray(raw.dense[name])
        vectors = np.zeros((raw.size, modalities.continuous_count(name), m.patch_dim), np.float32)
        for b in range(raw.size):
            for n in range(m.max_tokens):
                if m.kind == "embedding":
                    if n < length[b, modalities.index(name)]:
                        vectors[b, n] = values[b, n].astype(np.float32)
                    continue
                r, c, p = n // m.grid[1], n % m.grid[1], m.patch_size
                patch = values[b, r * p : (r + 1) * p, c * p : (c + 1) * p].astype(np.float32) / np.float32(255)
                vectors[b, n] = ((patch - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).reshape(-1)
        out[name] = vectors
    return out
