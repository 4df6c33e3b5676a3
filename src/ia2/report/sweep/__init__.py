"""Tables and figures of a grid's cells."""
