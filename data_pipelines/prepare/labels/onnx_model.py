"""Any ONNX file as a labeller, run by ONNX Runtime (`pip install '.[labels]'`).

    make("onnx", model="dpt.onnx", output={"kind": "depth", "range": "picture", "invert": True}, size=384,
         mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    make("onnx", model="detector.onnx", output={"kind": "boxes", "class_names": "coco.txt", "unit": "relative"},
         output_names={"boxes": "box", "scores": "conf", "classes": "cls"}, resize="letterbox")

The model has one input, the picture. What the network was trained with has to be said (normalisation, order of the
channels); what the file itself says is read from it and compared with the options. A difference is an error that lists
the file's inputs and outputs.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.prepare.labels import Record, pixels
from data_pipelines.prepare.labels.onnx_outputs import Geometry, open_output

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_OPTIONAL = "classes"


class OnnxModel:
    """Labels by an ONNX model.

    Attributes:
      name, domain, needs: see `Labeller`; the name has a digest of the file, not of the options.
    """

    needs = ()

    def __init__(
        self,
        model: str | os.PathLike,
        output: str | Mapping[str, Any],
        output_names: str | Mapping[str, str] | None = None,
        size: int | Sequence[int] | None = None,
        layout: str | None = None,
        resize: str = "stretch",
        resample: str = "bilinear",
        scale: float | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        bgr: bool = False,
        batch_size: int = 8,
        threads: int = 1,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        """Loads the model.

        Args:
          model: the file.
          output: what the output means: a kind of `onnx_outputs.KINDS` (depth, normal, semseg, edges, features, vector,
            logits, boxes), or a mapping with "kind" and that kind's options.
          output_names: the output's name; for boxes a mapping of "boxes", "scores" and "classes" to names. None takes
            the only output.
          size: (height, width) or the edge of the network's input; None is the model's, or the pictures' own where the
            model leaves it open.
          layout: of the input, "NCHW" or "NHWC"; None reads it from the model.
          resize: "stretch", or "letterbox" to keep the aspect and add grey at the sides.
          resample: filter, "nearest", "bilinear" or "bicubic".
          scale, mean, std: the network gets (pixel * scale - mean) / std; scale is 1/255 if not given. Inputs of uint8
            get the pixels as they are, and take none of the three.
          bgr: blue first; mean and std are in that order then.
          batch_size: pictures a call where the model leaves it open.
          threads: of ONNX Runtime; 1 where several processes share the machine.
          providers: of ONNX Runtime, in the order in which they are tried.

        Raises:
          ImportError: ONNX Runtime is not installed.
          FileNotFoundError: no such file.
          ValueError: not an ONNX model, or one that the options do not fit.
        """
        self.path = pathlib.Path(model)
        if not self.path.is_file():
            raise FileNotFoundError(f"{model}: no such ONNX model")
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("ONNX models are run by ONNX Runtime: pip install '.[labels]' in the checkout") from error
        for what, value, known in (
            ("resize", resize, ("stretch", "letterbox")),
            ("resample", resample, pixels.FILTERS),
            ("layout", layout, (None, "NCHW", "NHWC")),
        ):
            if value not in known:
                raise ValueError(f"{what} is {value!r}; it is one of {', '.join(map(str, known))}")
        if len(mean) != 3 or len(std) != 3 or not all(std) or batch_size < 1:
            raise ValueError(f"mean={mean} and std={std} need three values, std none of 0; batch_size={batch_size} > 0")
        self._output = open_output(output)
        self._letterbox, self._resample, self._bgr = resize == "letterbox", resample, bgr
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        settings.log_severity_level = 3
        content = self.path.read_bytes()
        try:
            self._session = onnxruntime.InferenceSession(str(self.path), settings, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions have no other common base
            raise ValueError(f"{model}: ONNX Runtime cannot load it: {error}") from error
        self.domain = self._output.domain
        self.name = f"onnx-{self.path.stem}-{hashlib.sha256(content).hexdigest()[:8]}-{self.domain}"
        self._set_input(layout, size, batch_size, scale, mean, std)
        self._set_outputs(output_names)

    def label(self, images: np.ndarray, records: Sequence[Record] | None = None) -> np.ndarray | list:
        """uint8 [B, H, W, 3] -> labels of the output's kind.

        Raises:
          ValueError: other images, or an output of the model that does not have the shape of its kind.
        """
        images = pixels.check_images(images)
        found = []
        for start in range(0, len(images), self._batch):
            batch, placed = pixels.fit(
                images[start : start + self._batch], self._size or images.shape[1:3], self._letterbox, self._resample
            )
            where = Geometry(batch.shape[1:3], images.shape[1:3], placed, self._layout)
            missing = self._batch - len(batch) if self._fixed_batch else 0
            padded = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)])
            try:
                results = self._session.run(list(self._names.values()), {self._input: self._prepare(padded)})
            except Exception as error:
                raise self._wrong(f"ONNX Runtime could not run it on pictures {list(padded.shape)}: {error}") from error
            arrays = {role: np.asarray(result)[: len(batch)] for role, result in zip(self._names, results)}
            try:
                for role, array in arrays.items():
                    self._check_rank(role, array.shape)
                    if len(array) != len(batch):
                        raise ValueError(f"{self._names[role]} has {len(array)} rows for {len(batch)} pictures")
                found.append(self._output.labels(arrays, where))
            except ValueError as error:
                raise self._wrong(str(error)) from error
        return np.concatenate(found) if isinstance(found[0], np.ndarray) else [row for rows in found for row in rows]

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        x = images[..., ::-1] if self._bgr else images
        if self._dtype is not np.uint8:
            x = ((x * self._scale - self._mean) / self._std).astype(self._dtype)
        return np.ascontiguousarray(np.moveaxis(x, 3, 1) if self._layout == "NCHW" else x)

    def _set_input(self, layout, size, batch_size, scale, mean, std) -> None:
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise self._wrong("only models with one input, the picture, can be labellers")
        self._input, shape = inputs[0].name, [n if isinstance(n, int) else None for n in inputs[0].shape]
        if len(shape) != 4:
            raise self._wrong(f"the input {self._input!r} has {len(shape)} dimensions, a batch of pictures has four")
        can = [known for known, axis in (("NCHW", 1), ("NHWC", 3)) if shape[axis] in (3, None)]
        # Where one layout has its 3 channels and the other only an open dimension, the 3 decide.
        sure = [known for known, axis in (("NCHW", 1), ("NHWC", 3)) if shape[axis] == 3]
        if layout is None and len(sure or can) != 1:
            raise self._wrong("give layout, the input does not say it" if can else "the input has not 3 channels")
        self._layout = layout or (sure or can)[0]
        if self._layout not in can:
            raise self._wrong(f"layout={layout!r} does not fit the input {self._input!r}")
        rows = 2 if self._layout == "NCHW" else 1
        fixed = shape[rows : rows + 2]
        asked = (size, size) if isinstance(size, int) else tuple(size) if size is not None else (None, None)
        if len(asked) != 2 or any(a and f and a != f for a, f in zip(asked, fixed)):
            raise self._wrong(f"size={size} does not fit the input {self._input!r}")
        edges = [a or f for a, f in zip(asked, fixed)]
        if None in edges and edges != [None, None]:
            raise self._wrong(f"the input {self._input!r} leaves one edge open; give size")
        self._size = None if None in edges else tuple(edges)
        self._fixed_batch = shape[0] is not None
        self._batch = shape[0] or batch_size
        if inputs[0].type == "tensor(uint8)":
            self._dtype = np.uint8
            if scale is not None or any(mean) or any(s != 1 for s in std):
                raise self._wrong("an input of uint8 takes pixels as they are: leave out scale, mean and std")
        elif inputs[0].type in _FLOATS:
            self._dtype = _FLOATS[inputs[0].type]
        else:
            raise self._wrong(f"the input {self._input!r} is {inputs[0].type}; floats and uint8 can be given")
        self._scale = np.float32(1 / 255 if scale is None else scale)
        self._mean, self._std = np.array(mean, np.float32), np.array(std, np.float32)

    def _set_outputs(self, names: str | Mapping[str, str] | None) -> None:
        available = {output.name: output.shape for output in self._session.get_outputs()}
        roles = self._output.roles
        if names is None:
            if len(roles) > 1 or len(available) > 1:
                raise self._wrong(f"output_names has to say which output is {', '.join(roles)}")
            names = next(iter(available))
        self._names = {next(iter(roles)): names} if isinstance(names, str) else dict(names)
        if set(self._names) - set(roles) or set(roles) - set(self._names) - {_OPTIONAL}:
            raise self._wrong(f"output_names names {', '.join(self._names)}; expected {', '.join(roles)}")
        for role, name in self._names.items():
            if name not in available:
                raise self._wrong(f"there is no output {name!r}")
            if available[name]:  # ONNX Runtime gives an empty shape where the file has none
                self._check_rank(role, available[name])

    def _check_rank(self, role: str, shape: Sequence) -> None:
        if len(shape) not in self._output.roles[role]:
            expected = " or ".join(map(str, self._output.roles[role]))
            raise self._wrong(
                f"output {self._names[role]!r} has {len(shape)} dimensions; as {role} of the domain {self.domain!r} it "
                f"needs {expected}"
            )

    def _wrong(self, problem: str) -> ValueError:
        """The error, with what the model has."""

        def listed(nodes) -> str:
            return ", ".join(f"{n.name} {n.type.removeprefix('tensor(').rstrip(')')} {n.shape}" for n in nodes)

        return ValueError(
            f"{self.path}: {problem}. The model's inputs: {listed(self._session.get_inputs())}; "
            f"outputs: {listed(self._session.get_outputs())}"
        )
