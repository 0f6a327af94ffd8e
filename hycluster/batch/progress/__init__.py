"""How a job gets on, told in files, on a terminal and as a page."""
