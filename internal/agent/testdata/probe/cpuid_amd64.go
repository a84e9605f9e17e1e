package main

import "fmt"

// ask executes the instruction CPUID.
func ask(leaf, sub uint32) (a, b, c, d uint32)

// cpuid prints the answers of CPUID without those that differ between the machine's
// processors.
func cpuid() {
	for _, leaf := range []uint32{0, 1, 4, 7, 0x40000000, 0x80000001, 0x80000007, 0x80000008} {
		a, b, c, d := ask(leaf, 0)
		if leaf == 1 {
			b &= 1<<24 - 1 // the bits above are the number of the processor
		}
		fmt.Printf("%08x: %08x %08x %08x %08x\n", leaf, a, b, c, d)
	}
}
