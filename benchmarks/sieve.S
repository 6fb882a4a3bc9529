/* sieve.S: guests/sieve.inc as a function for C. */
        .intel_syntax noprefix
        .text
        .globl  sieve
        .include "sieve.inc"
        .section .note.GNU-stack, "", @progbits
