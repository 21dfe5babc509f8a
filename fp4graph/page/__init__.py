"""One HTML file of all that a folder of results holds."""

from fp4graph.page.gather import gather
from fp4graph.page.write import node_data, write_page

__all__ = ["gather", "node_data", "write_page"]
