"""Model families: the noise process that a model was trained on, and what its network predicts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFamily:
    """Noise process and prediction of a model, whatever its layers and image shape are.

    Attributes:
        process: "VP", "VE" or "EDM".
        prediction: "epsilon", "v_prediction" or "sample" (VP), "score" (VE), "preconditioned" (EDM, whose c_skip and
            c_out turn it into the image).
    """

    process: str
    prediction: str

    def __str__(self) -> str:
        return f"{self.process} {self.prediction}"
