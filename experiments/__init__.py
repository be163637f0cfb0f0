"""One program for each figure, table or benchmark."""
