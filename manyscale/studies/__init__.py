"""Claims of the papers in miniature: ordinary runs, a table, a picture. Nothing else of the package imports them."""
