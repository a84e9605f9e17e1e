# Sixty files compiled side by side, and nothing the second time.
rm -rf /tmp/make && mkdir -p /tmp/make && cd /tmp/make
for n in $(seq 60); do echo "int f$n(int x) { return x + $n; }" >f$n.c; done
{
	echo '#include <stdio.h>'
	for n in $(seq 60); do echo "int f$n(int);"; done
	echo 'int main(void) { int s = 0;'
	for n in $(seq 60); do echo "s = f$n(s);"; done
	echo 'printf("%d", s); return 0; }'
} >main.c
printf 'objects = $(patsubst %%.c,%%.o,$(wildcard *.c))\nall: $(objects)\n\tgcc -o all $(objects)\n' >Makefile
make -s -j8
test "$(./all)" = 1830
make -j8 >again
grep -q "up to date" again
