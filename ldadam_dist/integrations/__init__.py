"""What users of another library import; each module imports that library and nothing else does."""
