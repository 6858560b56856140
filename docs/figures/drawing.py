"""A small SVG writer: a white sheet with lines, boxes, dots, arrows and text."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

INK, PALE, GRAY = "#1f2933", "#e4e7eb", "#7b8794"
BLUE, ORANGE, GREEN, RED = "#2563a8", "#c2571a", "#2f7d4f", "#b3261e"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


class Sheet:
    """A drawing of a fixed size in pixels; y grows downwards.

    title: what the drawing shows, for screen readers.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def line(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        color: str = INK,
        width: float = 1.5,
    ) -> None:
        (a, b), (c, d) = start, end
        self.parts.append(
            f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="{color}" '
            f'stroke-width="{width}"/>'
        )

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        color: str = INK,
        width: float = 1.5,
    ) -> None:
        """A line with a head at its end."""
        (a, b), (c, d) = start, end
        length = max(((c - a) ** 2 + (d - b) ** 2) ** 0.5, 1e-9)
        u, v = (c - a) / length, (d - b) / length
        back = (c - 8 * u, d - 8 * v)
        self.line(start, back, color, width)
        points = f"{c:.1f},{d:.1f} {back[0] - 4 * v:.1f},{back[1] + 4 * u:.1f} "
        points += f"{back[0] + 4 * v:.1f},{back[1] - 4 * u:.1f}"
        self.parts.append(f'<polygon points="{points}" fill="{color}"/>')

    def box(
        self,
        corner: tuple[float, float],
        size: tuple[float, float],
        fill: str = PALE,
        line: str = "none",
    ) -> None:
        (x, y), (w, h) = corner, size
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2" '
            f'fill="{fill}" stroke="{line}"/>'
        )

    def dot(self, x: float, y: float, color: str = BLUE, radius: float = 4) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>')

    def path(self, points: Sequence[tuple[float, float]], color: str, width: float = 2) -> None:
        """A line through several points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="{width}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        color: str = INK,
        size: int = 14,
        anchor: str = "start",
    ) -> None:
        """anchor: start, middle or end, the part of the text that stands at x."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" '
            f'text-anchor="{anchor}">{escape(words)}</text>'
        )

    def svg(self) -> str:
        """Returns the drawing."""
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" font-family="{FONT}">\n'
            f"<title>{escape(self.title)}</title>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="6" fill="#ffffff"/>\n'
            f"{body}\n</svg>\n"
        )
