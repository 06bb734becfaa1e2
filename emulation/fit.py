from pathlib import Path
from emulation.delays import Timings
def fit_timings(run: Path) -> Timings:
    raise NotImplementedError
