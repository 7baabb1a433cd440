"""One file per stage; the file name is the stage name and the section of kdpipe.yaml."""
