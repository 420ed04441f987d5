"""A page that shows what a quantized folder is: one HTML file that needs no other and no network."""

from paley.report.gather import Report, gather
from paley.report.page import write_page

__all__ = ["Report", "gather", "write_page"]
