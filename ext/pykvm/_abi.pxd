# Declarations of <linux/kvm.h>, nothing else. Values newer than the installed header are defined where absent.
# Anonymous members of struct kvm_run carry made-up type names here (run_io, ...): C never sees them.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <linux/kvm.h>
    #ifndef KVM_EXIT_MEMORY_FAULT
    #define KVM_EXIT_MEMORY_FAULT 39
    #endif
    #ifndef KVM_CAP_USER_MEMORY2
    #define KVM_CAP_USER_MEMORY2 231
    #endif
    #ifndef KVM_SET_USER_MEMORY_REGION2
    struct kvm_userspace_memory_region2 {
        __u32 slot; __u32 flags; __u64 guest_phys_addr; __u64 memory_size; __u64 userspace_addr;
        __u64 guest_memfd_offset; __u32 guest_memfd; __u32 pad1; __u64 pad2[14];
    };
    #define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
    #endif
    #ifndef KVM_CREATE_GUEST_MEMFD
    struct kvm_create_guest_memfd { __u64 size; __u64 flags; __u64 reserved[6]; };
    #define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
    #endif
    #ifndef KVM_SET_MEMORY_ATTRIBUTES
    struct kvm_memory_attributes { __u64 address; __u64 size; __u64 attributes; __u64 flags; };
    #define KVM_SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
    #endif
    """
    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr

    struct kvm_userspace_memory_region2:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr
        uint64_t guest_memfd_offset
        uint32_t guest_memfd

    struct kvm_create_guest_memfd:
        uint64_t size
        uint64_t flags

    struct kvm_memory_attributes:
        uint64_t address
        uint64_t size
        uint64_t attributes
        uint64_t flags

    struct kvm_regs:
        uint64_t rax

    struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type
        uint8_t present, dpl, db, s, l, g, avl
        uint8_t unusable

    struct kvm_dtable:
        uint64_t base
        uint16_t limit

    struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base
        uint64_t interrupt_bitmap[4]

    struct kvm_sregs2:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base
        uint64_t flags
        uint64_t pdptrs[4]

    struct kvm_fpu:
        uint8_t fpr[8][16]
        uint16_t fcw
        uint16_t fsw
        uint8_t ftwx
        uint16_t last_opcode
        uint64_t last_ip
        uint64_t last_dp
        uint8_t xmm[16][16]
        uint32_t mxcsr

    struct kvm_msr_entry:
        uint32_t index
        uint64_t data

    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry entries[0]

    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t indices[0]

    struct kvm_msr_filter_range:
        uint32_t flags
        uint32_t nmsrs
        uint32_t base
        uint8_t *bitmap

    struct kvm_msr_filter:
        uint32_t flags
        kvm_msr_filter_range ranges[16]

    struct kvm_cpuid_entry2:
        uint32_t function, index, flags, eax, ebx, ecx, edx

    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 entries[0]

    struct kvm_pit_config:
        uint32_t flags

    struct kvm_pit_channel_state:
        uint32_t count
        uint16_t latched_count
        uint8_t count_latched, status_latched, status, read_state, write_state, write_latch
        uint8_t rw_mode, mode, bcd, gate
        int64_t count_load_time

    struct kvm_pit_state2:
        kvm_pit_channel_state channels[3]
        uint32_t flags

    struct kvm_reinject_control:
        uint8_t pit_reinject

    struct kvm_irq_level:
        uint32_t irq
        int32_t status
        uint32_t level

    struct kvm_irqchip:
        uint32_t chip_id
        char chip_data "chip.dummy"[512]

    struct routing_irqchip:
        uint32_t irqchip
        uint32_t pin

    struct routing_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data
        uint32_t devid

    struct routing_hv_sint:
        uint32_t vcpu
        uint32_t sint

    union routing_union:
        routing_irqchip irqchip
        routing_msi msi
        routing_hv_sint hv_sint

    struct kvm_irq_routing_entry:
        uint32_t gsi
        uint32_t type
        uint32_t flags
        routing_union u

    struct kvm_irq_routing:
        uint32_t nr
        uint32_t flags
        kvm_irq_routing_entry entries[0]

    struct kvm_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data
        uint32_t flags
        uint32_t devid

    struct kvm_irqfd:
        uint32_t fd
        uint32_t gsi
        uint32_t flags
        uint32_t resamplefd

    struct kvm_ioeventfd:
        uint64_t datamatch
        uint64_t addr
        uint32_t len
        int32_t fd
        uint32_t flags

    struct kvm_coalesced_mmio_zone:
        uint64_t addr
        uint32_t size
        uint32_t pio

    struct kvm_coalesced_mmio:
        uint64_t phys_addr
        uint32_t len
        uint32_t pio
        uint8_t data[8]

    struct kvm_coalesced_mmio_ring:
        uint32_t first
        uint32_t last
        kvm_coalesced_mmio coalesced_mmio[0]

    struct kvm_clock_data:
        uint64_t clock
        uint32_t flags
        uint64_t realtime
        uint64_t host_tsc

    struct kvm_enable_cap:
        uint32_t cap
        uint32_t flags
        uint64_t args[4]

    struct kvm_create_device:
        uint32_t type
        uint32_t fd
        uint32_t flags

    struct kvm_device_attr:
        uint32_t flags
        uint32_t group
        uint64_t attr
        uint64_t addr

    struct kvm_enc_region:
        uint64_t addr
        uint64_t size

    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap

    struct kvm_clear_dirty_log:
        uint32_t slot
        uint32_t num_pages
        uint64_t first_page
        void *dirty_bitmap

    struct kvm_dirty_gfn:
        uint32_t flags
        uint32_t slot
        uint64_t offset

    struct kvm_lapic_state:
        char regs[1024]

    struct kvm_mp_state:
        uint32_t mp_state

    struct events_exception:
        uint8_t injected, nr, has_error_code, pending
        uint32_t error_code

    struct events_interrupt:
        uint8_t injected, nr, soft, shadow

    struct events_nmi:
        uint8_t injected, pending, masked

    struct events_smi:
        uint8_t smm, pending, smm_inside_nmi, latched_init

    struct events_triple_fault:
        uint8_t pending

    struct kvm_vcpu_events:
        events_exception exception
        events_interrupt interrupt
        events_nmi nmi
        uint32_t sipi_vector
        uint32_t flags
        events_smi smi
        events_triple_fault triple_fault
        uint8_t exception_has_payload
        uint64_t exception_payload

    struct kvm_debugregs:
        uint64_t db[4]
        uint64_t dr6
        uint64_t dr7
        uint64_t flags

    struct kvm_guest_debug_arch:
        uint64_t debugreg[8]

    struct kvm_guest_debug:
        uint32_t control
        kvm_guest_debug_arch arch

    struct kvm_interrupt:
        uint32_t irq

    struct kvm_xsave:
        uint32_t region[1024]

    struct kvm_xcr:
        uint32_t xcr
        uint64_t value

    struct kvm_xcrs:
        uint32_t nr_xcrs
        uint32_t flags
        kvm_xcr xcrs[16]

    struct kvm_translation:
        uint64_t linear_address
        uint64_t physical_address
        uint8_t valid, writeable, usermode

    struct kvm_signal_mask:
        uint32_t len
        uint8_t sigset[0]

    struct kvm_nested_state:
        uint16_t flags
        uint16_t format
        uint32_t size

    struct kvm_tpr_access_ctl:
        uint32_t enabled
        uint32_t flags

    struct kvm_vapic_addr:
        uint64_t vapic_addr

    struct kvm_x86_mce:
        uint64_t status, addr, misc, mcg_status
        uint8_t bank

    struct kvm_sync_regs:
        kvm_regs regs
        kvm_sregs sregs
        kvm_vcpu_events events

    struct run_hw:
        uint64_t hardware_exit_reason

    struct run_fail_entry:
        uint64_t hardware_entry_failure_reason
        uint32_t cpu

    struct run_io:
        uint8_t direction
        uint8_t size
        uint16_t port
        uint32_t count
        uint64_t data_offset

    struct kvm_debug_exit_arch:
        uint32_t exception
        uint64_t pc
        uint64_t dr6
        uint64_t dr7

    struct run_debug:
        kvm_debug_exit_arch arch

    struct run_mmio:
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    struct run_internal:
        uint32_t suberror
        uint32_t ndata
        uint64_t data[16]

    struct run_emulation_failure:
        uint32_t suberror
        uint32_t ndata
        uint64_t flags
        uint8_t insn_size
        uint8_t insn_bytes[15]

    struct run_msr:
        uint8_t error
        uint32_t reason
        uint32_t index
        uint64_t data

    struct run_eoi:
        uint8_t vector

    struct run_sync:
        kvm_sync_regs regs

    struct kvm_run:
        uint8_t request_interrupt_window
        uint8_t immediate_exit
        uint32_t exit_reason
        uint8_t ready_for_interrupt_injection
        uint8_t if_flag
        uint16_t flags
        uint64_t cr8
        uint64_t apic_base
        run_hw hw
        run_fail_entry fail_entry
        run_io io
        run_debug debug
        run_mmio mmio
        run_internal internal
        run_emulation_failure emulation_failure
        run_msr msr
        run_eoi eoi
        uint64_t kvm_valid_regs
        uint64_t kvm_dirty_regs
        run_sync s

    enum:
        KVM_API_VERSION
        KVM_EXIT_IO
        KVM_EXIT_IO_IN
        KVM_EXIT_IO_OUT
        KVM_EXIT_MMIO
        KVM_EXIT_HLT
        KVM_EXIT_INTR
        KVM_EXIT_SET_TPR
        KVM_EXIT_SHUTDOWN
        KVM_EXIT_DEBUG
        KVM_EXIT_INTERNAL_ERROR
        KVM_EXIT_MEMORY_FAULT
        KVM_EXIT_X86_RDMSR
        KVM_EXIT_X86_WRMSR
        KVM_INTERNAL_ERROR_EMULATION
        KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        KVM_SYNC_X86_REGS
        KVM_SYNC_X86_SREGS
        KVM_CAP_SYNC_REGS
        KVM_CAP_XSAVE2
        KVM_CAP_COALESCED_MMIO
        KVM_CAP_NESTED_STATE
        KVM_CAP_DIRTY_LOG_RING
        KVM_MP_STATE_HALTED
        KVM_MP_STATE_UNINITIALIZED
        KVM_MP_STATE_INIT_RECEIVED
        KVM_IRQ_ROUTING_IRQCHIP
        KVM_IRQ_ROUTING_MSI
        KVM_GUESTDBG_ENABLE
        KVM_GUESTDBG_SINGLESTEP
        KVM_GUESTDBG_USE_HW_BP
        KVM_DIRTY_LOG_PAGE_OFFSET
        KVM_DIRTY_GFN_F_DIRTY
        KVM_DIRTY_GFN_F_RESET

    const unsigned long KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_MSR_INDEX_LIST, KVM_CHECK_EXTENSION
    const unsigned long KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID
    const unsigned long KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_GET_SUPPORTED_HV_CPUID
    const unsigned long KVM_X86_GET_MCE_CAP_SUPPORTED
    const unsigned long KVM_CREATE_VCPU, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS
    const unsigned long KVM_SET_NR_MMU_PAGES, KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2
    const unsigned long KVM_CREATE_GUEST_MEMFD, KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_TSS_ADDR
    const unsigned long KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_IRQCHIP, KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS
    const unsigned long KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_CREATE_PIT2, KVM_GET_PIT2, KVM_SET_PIT2
    const unsigned long KVM_SET_GSI_ROUTING, KVM_REINJECT_CONTROL, KVM_IRQFD, KVM_IOEVENTFD
    const unsigned long KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO, KVM_SET_BOOT_CPU_ID
    const unsigned long KVM_SET_CLOCK, KVM_GET_CLOCK, KVM_SIGNAL_MSI, KVM_CREATE_DEVICE
    const unsigned long KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR
    const unsigned long KVM_MEMORY_ENCRYPT_REG_REGION, KVM_MEMORY_ENCRYPT_UNREG_REGION
    const unsigned long KVM_X86_SET_MSR_FILTER, KVM_GET_STATS_FD, KVM_ENABLE_CAP
    const unsigned long KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS
    const unsigned long KVM_GET_SREGS2, KVM_SET_SREGS2, KVM_TRANSLATE, KVM_INTERRUPT
    const unsigned long KVM_GET_MSRS, KVM_SET_MSRS, KVM_SET_SIGNAL_MASK, KVM_GET_FPU, KVM_SET_FPU
    const unsigned long KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_CPUID2, KVM_GET_CPUID2
    const unsigned long KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_NMI, KVM_SMI, KVM_SET_GUEST_DEBUG
    const unsigned long KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS
    const unsigned long KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_XSAVE2, KVM_GET_XCRS, KVM_SET_XCRS
    const unsigned long KVM_KVMCLOCK_CTRL, KVM_SET_TSC_KHZ, KVM_GET_TSC_KHZ
    const unsigned long KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE, KVM_TPR_ACCESS_REPORTING
    const unsigned long KVM_SET_VAPIC_ADDR, KVM_X86_SETUP_MCE, KVM_X86_SET_MCE
