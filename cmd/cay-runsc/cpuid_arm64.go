package main

// plainCPUID does nothing, since arm64 has no such instruction.
func plainCPUID() {}
