"""The paper's tables and figures, made from the files that finished runs left behind; nothing here trains."""
