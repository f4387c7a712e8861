"""Tables and pictures from records, beside the paper's."""
