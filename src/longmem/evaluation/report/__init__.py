"""Result files as a Markdown page and as one HTML page that needs nothing else."""
