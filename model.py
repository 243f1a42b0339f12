"""What the network is, trains on and is scored by."""
from dataclasses import dataclass

from reproject import Grid


@dataclass(frozen=True)
class Config:
    """All that decides the shape of the network and of the data it reads."""
    # the ground: metres in the ego frame (reproject.py); a cell is square
    x_range: tuple[float, float] = (-30.0, 30.0)
    y_range: tuple[float, float] = (-15.0, 15.0)
    cell: float = 0.3
    line_width: float = 0.75  # m; dividers and boundaries as drawn in the ground truth (HDMapNet: 5 cells of 0.15 m)
    # the images: (height, width) in pixels
    image_size: tuple[int, int] = (144, 256)

    @property
    def grid(self):
        return Grid(self.x_range, self.y_range, self.cell)


PRESETS = {"toy": Config(), "tiny": Config(image_size=(450, 800)), "small": Config(image_size=(720, 1280)),
           "paper": Config(image_size=(450, 800), cell=0.15)}
