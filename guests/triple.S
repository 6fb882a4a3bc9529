/*
 * triple: shuts the processor down with a triple fault.
 *
 * UD2 raises #UD. The IDT has no room for it, which raises #GP; that has no gate either, which
 * makes a double fault; and that has none, which is where the processor gives up
 * (SDM volume 3, 6.15).
 *
 * Mode:      long
 * Prints:    ""
 * Exit:      shutdown
 */
        .include "common.inc"
        .code64

start:  lidt    [empty]
        ud2

empty:  .word   0                               # limit
        .quad   0                               # base
