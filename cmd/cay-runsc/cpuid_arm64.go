package main

// plainCPUID has nothing to do: there is no such instruction.
func plainCPUID() {}
