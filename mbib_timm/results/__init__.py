"""What is kept of runs: one typed record, read and written here, with the paper's numbers, tables and figures."""
