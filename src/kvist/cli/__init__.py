"""The command line: one verb per file. Heavy imports wait inside the verbs, so that help is quick."""
