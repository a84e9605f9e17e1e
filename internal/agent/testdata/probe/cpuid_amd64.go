package main

import "fmt"

// ask is the instruction CPUID.
func ask(leaf, sub uint32) (a, b, c, d uint32)

// cpuid prints what the processor says of itself, but for what depends on which of
// the machine's processors is asked.
func cpuid() {
	for _, leaf := range []uint32{0, 1, 4, 7, 0x40000000, 0x80000001, 0x80000007, 0x80000008} {
		a, b, c, d := ask(leaf, 0)
		if leaf == 1 {
			b &= 1<<24 - 1 // above is the number of the processor
		}
		fmt.Printf("%08x: %08x %08x %08x %08x\n", leaf, a, b, c, d)
	}
}
