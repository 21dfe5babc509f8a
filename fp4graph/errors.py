"""Errors that a user can act on; all are `Fp4GraphError`, and all messages are one line."""


class Fp4GraphError(ValueError):
    """Base of every error that fp4graph raises about the user's input."""


class SelectorError(Fp4GraphError):
    """A selector that cannot be parsed, or that does not fit the model.

    Attributes:
        text: the selector as the user wrote it.
        column: 1-based column of the offending term, or None where the whole text is meant.
    """

    def __init__(self, text: str, problem: str, column: int | None = None) -> None:
        self.text = text
        self.column = column
        where = f", column {column}" if column is not None else ""
        self.problem = problem
        super().__init__(f"selector {text!r}{where}: {problem}")

    def with_hint(self, hint: str) -> "SelectorError":
        """Return the same error with advice at its end."""
        return SelectorError(self.text, f"{self.problem}; {hint}", self.column)


class OptionError(Fp4GraphError):
    """An unknown option, or an option with a value that it does not take."""


class WeightError(Fp4GraphError):
    """A weight that cannot be quantised: NaN, Inf, wrong rank or dtype."""


class RefusalError(Fp4GraphError):
    """A selected linear that no kernel, or no rewrite, can serve."""


class GradientError(Fp4GraphError):
    """A call that needs gradients, which FP4 linears do not have."""


class RecompileError(Fp4GraphError):
    """A function that needs more graphs than Dynamo keeps before it runs the plain model."""


class TorchVersionError(Fp4GraphError):
    """A version of torch that lacks, or has changed, something private that fp4graph needs."""


class ModelError(Fp4GraphError):
    """A model that cannot be found, loaded or used for the job at hand."""


class CalibrationError(Fp4GraphError):
    """A calibration that cannot be made, read, or used for this model."""


class CorpusError(Fp4GraphError):
    """A text that cannot be found or is too short."""


class StudyError(Fp4GraphError):
    """A trial whose number would be wrong, or a result folder that does not fit the request."""
